"""Killed anywhere on its way onto a network or off it, a machine leaves nothing that isn't cleaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.network import AttachOptions, Policy, PublishedPort, attach, manage

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed import TraceFunction

    from tests.framework.networks import Peer

pytestmark = [pytest.mark.root, pytest.mark.netns]

_POINTS = 12
_SERVERS = (b"dnsmasq", b"ringfence-gateway", b"_names_server")


def _come_and_go(mode: str, die_at: int = 0) -> int:
    """Attaches a machine and detaches it; how many lines that took. Dies at one of them."""
    on_lan = mode.startswith("bridge")
    policy = Policy(allow=["good.example"]) if on_lan or mode == "nat" else Policy()
    ports = () if on_lan or mode == "isolated" else (PublishedPort(host=0, guest=80),)
    own = ("10.93.0.50/24",) if on_lan else ()
    options = AttachOptions(name="m", policy=policy, publish=ports, addresses=own)
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        nonlocal lines
        if "ringfence/network" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        if lines == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace if die_at else None)
    try:
        with attach(mode, "machine", "vm", options):
            return lines
    finally:
        sys.settrace(None)


def _said(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _left(home: Path) -> dict[str, object]:
    """What a network puts on a host."""
    servers = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        parent = (path.parent / "stat").read_text().rpartition(")")[2].split()[1]
        ours = str(home).encode() in words or parent in ("1", str(os.getpid()))
        if ours and any(name in words for name in _SERVERS):
            servers.append(words)
    return {
        "links": sorted(line.split()[0] for line in _said("ip", "-br", "link").splitlines()),
        "tables": _said("nft", "list", "tables"),
        "servers": sorted(servers),
        "files": sorted(path.name for path in home.rglob("*") if path.is_file()),
        "sockets": sorted(path.name for path in home.rglob("*") if path.is_socket()),
    }


def _lines(mode: str) -> int:
    """How many lines the whole way has."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        # One that is never reached.
        os.write(sending, str(_come_and_go(mode, die_at=1 << 30)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(sending)
    with os.fdopen(receiving) as file:
        return int(file.read())


@pytest.mark.parametrize("mode", ["user", "isolated", "nat"])
def test_the_next_command_cleans(home: Path, peer: Peer, mode: str) -> None:  # noqa: ARG001
    killed_anywhere(home, mode)


def killed_anywhere(home: Path, mode: str) -> None:
    """Kills a machine's holder at many points, and looks at what is left of it."""
    lines = _lines(mode)
    assert lines > 100
    manage.heal()
    before = _left(home)
    # A tenth more for the way off.
    for point in range(1, lines + lines // 10, lines // _POINTS):
        child = os.fork()
        if child == 0:
            _come_and_go(mode, die_at=point)
            os._exit(0)
        os.waitpid(child, 0)
        deadline = time.monotonic() + 5
        manage.heal()
        while (after := _left(home)) != before and time.monotonic() < deadline:
            # Servers end by themselves, a moment after the machine's holder.
            time.sleep(0.1)
            manage.heal()
        assert after == before, f"killed at line {point} of {lines}"

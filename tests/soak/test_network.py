"""The gateway under load for minutes: nothing is lost, and nothing grows."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.network import AttachOptions, Policy, attach, gateway
from ringfence.network.user import control_path
from tests.framework.networks import Namespace, Peer

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.slow]

# Five minutes stand for a day: more connections a minute than most machines make in an hour.
SECONDS = float(os.environ.get("RINGFENCE_SOAK_S", "300"))

_LOAD = """
import socket, sys, time
v4, v6, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
end = time.monotonic() + seconds
done = 0
while time.monotonic() < end:
    for host in (v4, v6):
        many = [socket.create_connection((host, 7), timeout=30) for _ in range(50)]
        for one in many:
            one.sendall(b"x" * 5000)
        for number, one in enumerate(many):
            got = 0
            while got < 5000:
                got += len(one.recv(65536))
            if number % 3 == 0:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
            one.close()
        done += len(many)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.settimeout(5)
            s.connect((host, 7))
            s.send(b"x" * 1000)
            assert len(s.recv(2000)) == 1000
print(done)
"""


def _figures(pid: int) -> tuple[int, int]:
    """Resident memory in KiB, and open descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory = int(status.partition("VmRSS:")[2].split()[0])
    return memory, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _connections(control: gateway.Gateway) -> int:
    status = control.status()
    relay = status["relay"]
    assert isinstance(relay, dict)
    return int(str(status["tcp_connections"])) + int(relay["connections"])


def _settled(control: gateway.Gateway) -> Mapping[str, object]:
    deadline = time.monotonic() + 60
    while _connections(control) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _connections(control) == 0
    return control.status()


@pytest.mark.parametrize("mode", ["user", "nat"])
def test_a_day_of_connections_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path))
    # In the kernel's networks it's the relay that sees them, where names are denied.
    options = AttachOptions(policy=Policy(deny=["evil.example"] if mode == "nat" else ()))
    with (
        Peer() as peer,
        Namespace() as guest,
        attach(mode, "soak", "container", options) as attachment,
    ):
        attachment.enter(guest.pid)
        with gateway.connect(control_path("soak" if mode == "user" else mode)) as control:
            pid = int(str(control.status()["pid"]))
            guest.python(_LOAD, peer.v4, peer.v6, "5", timeout_s=60)
            _settled(control)
            memory, descriptors = _figures(pid)
            done = guest.python(_LOAD, peer.v4, peer.v6, str(SECONDS), timeout_s=SECONDS + 60)
            assert int(done) > 10_000 / 60 * SECONDS
            status = _settled(control)
            assert status["buffer_bytes"] == 0
            after, descriptors_after = _figures(pid)
            sys.stdout.write(
                f"\n{mode}: {done} connections in {SECONDS:.0f} s; memory {memory} KiB before,"
                f" {after} KiB after; descriptors {descriptors} and {descriptors_after},"
                f" {status['udp_flows']} of them of datagrams' flows\n"
            )
            assert after < memory + 4096
            # Datagrams' flows are kept for minutes, each with its descriptor.
            assert descriptors_after - descriptors <= int(str(status["udp_flows"]))

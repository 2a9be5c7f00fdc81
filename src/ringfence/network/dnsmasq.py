"""Addresses and names for the machines of a kernel's network, told by dnsmasq.

Source: ``dnsmasq(8)``.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import HostError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ringfence.network.store import Member, NetworkSpec

__all__ = ["CHILDREN", "HOST_NAME", "Serving", "apply", "end", "program", "running", "stop"]

# By which machines find this host, in user-space networks too.
_DOMAIN = "ringfence.internal"
HOST_NAME = f"host.{_DOMAIN}"
_NO_NAMES = "--port=0"
_TIMEOUT_S = 20.0
_READ_S = 1.0

# Servers that outlive the machine that started them; kept here to be reaped.
CHILDREN: list[subprocess.Popen[bytes]] = []


def program() -> str:
    """Where dnsmasq is.

    Raises:
        UnsupportedError: It is missing.
    """
    found = shutil.which("dnsmasq", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        message = "the program dnsmasq is missing: it tells machines their addresses and names"
        raise UnsupportedError(message, hint="apt install dnsmasq-base")
    return found


def running(folder: Path, file: str) -> int | None:
    """The process of a network's server, by the file that names it."""
    CHILDREN[:] = [child for child in CHILDREN if child.poll() is None]
    with suppress(OSError, ValueError):
        pid = int((folder / file).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        # The number may be another's by now.
        if str(folder).encode() in words:
            return pid
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a network is served.

    Args:
        folder: For files.
        bridge: The network's bridge.
        first: The host's address in each subnet.
        routed: Whether the host is the way outside.
        names: Whether names are told as well as addresses.
        known: The names that are answered.
    """

    folder: Path
    bridge: str
    first: Sequence[str]
    routed: bool
    names: bool
    known: Mapping[str, list[str]]


def apply(serving: Serving, spec: NetworkSpec, members: Sequence[Member]) -> None:
    """Tells dnsmasq who is on the network now; starts it when it doesn't run.

    Raises:
        HostError: It can't be started.
        UnsupportedError: It is missing.
    """
    folder = serving.folder
    hosts = folder / "hosts"
    leases = folder / "dhcp-hosts"
    known = [f"{ip} {name}\n" for name, own in serving.known.items() for ip in own]
    known += [f"{ip} {HOST_NAME}\n" for ip in serving.first]
    v4 = next(address for address in serving.first if ":" not in address)
    mark = f"{secrets.token_hex(8)}.{_DOMAIN}"
    hosts.write_text("".join([*known, f"{v4} {mark}\n"]))
    leases.write_text(
        "".join(f"{one.mac},{ip}\n" for one in members for ip in one.addresses if ":" not in ip)
    )
    pid = running(folder, "dnsmasq.pid")
    if pid is not None and _serves_names(pid) == serving.names:
        os.kill(pid, signal.SIGHUP)
        if serving.names:
            _wait_until_read(v4, mark)
        return
    if pid is not None:
        end(pid)
    words = [
        program(), "--conf-file=/dev/null", "--no-hosts", "--bind-dynamic", "--except-interface=lo",
        f"--interface={serving.bridge}", f"--pid-file={folder / 'dnsmasq.pid'}",
        f"--addn-hosts={hosts}", f"--dhcp-hostsfile={leases}", "--dhcp-leasefile=/dev/null",
        "--leasefile-ro", f"--dhcp-range={v4},static,infinite", "--dhcp-authoritative",
        f"--dhcp-option=option:mtu,{spec.mtu}", "--user=root", "--stop-dns-rebind", "--no-poll",
        f"--local=/{_DOMAIN}/",
    ]  # fmt: skip
    if not serving.names:
        words += [_NO_NAMES, f"--dhcp-option=option:dns-server,{v4}"]
    if not serving.routed:
        words += ["--no-resolv", "--dhcp-option=option:router"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        message = f"cannot start dnsmasq: {done.stderr.strip()}"
        raise HostError(message)


def _wait_until_read(server: str, name: str) -> None:
    """Waits until it knows a name: it reads its files a moment after it's told to.

    What a machine asks before that is asked of the host's name servers, and so are the repetitions
    of its question: where they don't answer, it would hear nothing for as long as it asks.
    """
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    query = b"rf\1\0\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"
    deadline = time.monotonic() + _READ_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.05)
        while time.monotonic() < deadline:
            with suppress(OSError):
                asking.sendto(query, (server, 53))
                # The count of answers.
                if asking.recv(512)[6:8] == b"\0\1":
                    return
            time.sleep(0.001)


def _serves_names(pid: int) -> bool:
    with suppress(OSError):
        return _NO_NAMES.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def end(pid: int) -> None:
    """Ends it, and waits until its port is free."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGTERM)
            select.select([handle], [], [], _TIMEOUT_S)
        finally:
            os.close(handle)


def stop(folder: Path) -> None:
    """Ends it, if it runs."""
    pid = running(folder, "dnsmasq.pid")
    if pid is not None:
        end(pid)
    for name in ("dnsmasq.pid", "hosts", "dhcp-hosts"):
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)

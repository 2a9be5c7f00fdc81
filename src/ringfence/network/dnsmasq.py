"""Addresses and names for the machines of a kernel's network, told by dnsmasq.

Source: ``dnsmasq(8)``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import HostError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.network.store import Member, NetworkSpec

__all__ = ["apply", "program", "stop"]

_TIMEOUT_S = 20.0


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


def _running(folder: Path) -> int | None:
    with suppress(OSError, ValueError):
        pid = int((folder / "dnsmasq.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        # The number may be another's by now.
        if str(folder).encode() in words:
            return pid
    return None


def apply(
    folder: Path,
    bridge: str,
    spec: NetworkSpec,
    first: Sequence[str],
    members: Sequence[Member],
    *,
    routed: bool,
) -> None:
    """Tells dnsmasq who is on the network now; starts it when it doesn't run.

    Args:
        folder: For its files.
        bridge: The network's bridge.
        spec: The network.
        first: The host's address in each subnet.
        members: The machines.
        routed: Whether the host is the way outside.

    Raises:
        HostError: It can't be started.
        UnsupportedError: It is missing.
    """
    hosts = folder / "hosts"
    leases = folder / "dhcp-hosts"
    hosts.write_text(
        "".join(f"{ip} {one.name}\n" for one in members if one.name for ip in one.addresses)
    )
    leases.write_text(
        "".join(f"{one.mac},{ip}\n" for one in members for ip in one.addresses if ":" not in ip)
    )
    pid = _running(folder)
    if pid is not None:
        os.kill(pid, signal.SIGHUP)
        return
    v4 = next(address for address in first if ":" not in address)
    words = [
        program(), "--conf-file=/dev/null", "--no-hosts", "--bind-dynamic", "--except-interface=lo",
        f"--interface={bridge}", f"--pid-file={folder / 'dnsmasq.pid'}",
        f"--addn-hosts={hosts}", f"--dhcp-hostsfile={leases}", "--dhcp-leasefile=/dev/null",
        "--leasefile-ro", f"--dhcp-range={v4},static,infinite", "--dhcp-authoritative",
        f"--dhcp-option=option:mtu,{spec.mtu}", "--user=root", "--stop-dns-rebind", "--no-poll",
    ]  # fmt: skip
    if not routed:
        words += ["--no-resolv", "--dhcp-option=option:router"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        message = f"cannot start dnsmasq: {done.stderr.strip()}"
        raise HostError(message)


def stop(folder: Path) -> None:
    """Ends it, if it runs."""
    pid = _running(folder)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    for name in ("dnsmasq.pid", "hosts", "dhcp-hosts"):
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)

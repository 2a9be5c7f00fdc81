"""A LAN of this host: a plain interface, and a peer on it that is a router and a DHCP server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.framework.networks import PEER_PROGRAM, Namespace

if TYPE_CHECKING:
    from contextlib import ExitStack

__all__ = ["FAR4", "FAR6", "HOST4", "HOST6", "PEER4", "PEER6", "Lan", "ip"]

HOST4, HOST6 = "10.93.0.1", "fd00:93::1"
PEER4, PEER6 = "10.93.0.9", "fd00:93::9"
# Behind the router: all names below ``example`` are there.
FAR4, FAR6 = "203.0.113.9", "2001:db8:93::9"


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    return done.stdout


class Lan:
    """The LAN, whose peer has :mod:`tests.framework.network_peer`'s services."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.interface = f"rfp{os.getpid() % 100000}"
        self.peer = stack.enter_context(Namespace())
        ip(
            "link",
            "add",
            self.interface,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            str(self.peer.pid),
        )
        for address in (f"{HOST4}/24", f"{HOST6}/64"):
            nodad = ("nodad",) if ":" in address else ()
            ip("addr", "add", address, "dev", self.interface, *nodad)
        ip("link", "set", self.interface, "up")
        for words in (
            ("addr", "add", f"{PEER4}/24", "dev", "eth0"),
            ("addr", "add", f"{PEER6}/64", "dev", "eth0", "nodad"),
            ("link", "set", "eth0", "up"),
            ("addr", "add", f"{FAR4}/32", "dev", "lo"),
            ("addr", "add", f"{FAR6}/128", "dev", "lo", "nodad"),
        ):
            assert self.peer.run("ip", *words).returncode == 0
        # A way that this host has by the LAN.
        ip("route", "add", "10.193.0.0/24", "via", PEER4, "dev", self.interface)
        ip("route", "add", FAR4, "via", PEER4, "dev", self.interface)
        ip("-6", "route", "add", FAR6, "via", PEER6, "dev", self.interface)
        self._serve(sys.executable, "-IS", str(PEER_PROGRAM), FAR4, FAR6, stack=stack)
        self._dhcp(folder, stack)

    def _serve(self, *argv: str, stack: ExitStack) -> None:
        running = self.peer.spawn(*argv)
        stack.callback(running.communicate)
        stack.callback(running.kill)
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"

    def _dhcp(self, folder: Path, stack: ExitStack) -> None:
        words = [
            "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0",
            "--bind-interfaces", f"--dhcp-leasefile={folder / 'lan-leases'}", "--user=root",
            "--dhcp-range=10.93.0.100,10.93.0.120,255.255.255.0,1h",
            f"--dhcp-option=option:router,{PEER4}", f"--dhcp-option=option:dns-server,{PEER4}",
        ]  # fmt: skip
        running = self.peer.spawn(*words)
        stack.callback(running.communicate)
        stack.callback(running.kill)

    def state(self) -> tuple[str, str, str]:
        """What this host has on the LAN, but for how long it has been there."""
        addresses = ip("-br", "addr", "show", "dev", self.interface).split()[2:]
        routes = [ip("-4", "route", "show", "dev", self.interface)]
        routes.append(ip("-6", "route", "show", "dev", self.interface))
        master = Path(f"/sys/class/net/{self.interface}/master").exists()
        plain = [text for text in addresses if not text.startswith("fe80")]
        return " ".join(sorted(plain)), "\n".join(sorted("".join(routes).splitlines())), str(master)

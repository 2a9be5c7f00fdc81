"""Hosts of tests' networks: network namespaces with real Linux stacks."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

__all__ = ["PEER_PROGRAM", "Namespace", "Peer"]

PEER_PROGRAM = Path(__file__).with_name("network_peer.py")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Namespace:
    """A network namespace, held by a process. A context manager.

    Args:
        rootless: In a user namespace of its own.
    """

    def __init__(self, *, rootless: bool = False) -> None:
        flags = "-Urn" if rootless else "-n"
        self._rootless = rootless
        script = "ip link set lo up; echo ready; exec sleep infinity"
        self._holder = subprocess.Popen(
            ["unshare", flags, "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        return self._holder.pid

    def _inside(self) -> list[str]:
        user = ["-U", "--preserve-credentials"] if self._rootless else []
        return ["nsenter", "-t", str(self.pid), *user, "-n"]

    def run(
        self, *argv: str, timeout_s: float = 30.0, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._inside(), *argv],
            input=stdin.decode(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def python(self, source: str, *arguments: str, timeout_s: float = 60.0) -> str:
        """Runs a program given as text in it, and returns what it printed."""
        done = self.run(sys.executable, "-IS", "-c", source, *arguments, timeout_s=timeout_s)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def spawn(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._inside(), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout is not None:
            self._holder.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Peer(Namespace):
    """A host beside this one, with :mod:`tests.framework.network_peer`'s services. Needs root.

    Args:
        v4: Its IPv4 address; this host has the one before.
        v6: Likewise.
    """

    def __init__(self, v4: str = "198.51.100.2", v6: str = "2001:db8:9::2") -> None:
        super().__init__()
        self.v4, self.v6 = v4, v6
        self._link = f"rft{os.getpid() % 100000}"
        own4, own6 = (f"{address[:-1]}1" for address in (v4, v6))
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._link)
        _ip("link", "add", self._link, "type", "veth", "peer", "eth0", "netns", str(self.pid))
        _ip("addr", "add", f"{own4}/24", "dev", self._link)
        _ip("addr", "add", f"{own6}/64", "dev", self._link, "nodad")
        _ip("link", "set", self._link, "up")
        for words in (
            ("addr", "add", f"{v4}/24", "dev", "eth0"),
            ("addr", "add", f"{v6}/64", "dev", "eth0", "nodad"),
            ("link", "set", "eth0", "up"),
        ):
            done = self.run("ip", *words)
            assert done.returncode == 0, done.stderr
        self._services = self.spawn(sys.executable, "-IS", str(PEER_PROGRAM), v4, v6)
        assert self._services.stdout is not None
        assert self._services.stdout.readline() == "ready\n"

    def close(self) -> None:
        self._services.kill()
        self._services.communicate()
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._link)
        super().close()

"""The user-space gateway against slirp4netns and pasta (passt), from the same namespace to the same host.

A Linux stack in a user and network namespace of an ordinary user plays the machine; iperf3 and short
connections go to a namespace that plays the host outside. All systems have packets of 65520 bytes at most.
Needs root, for the outside host and for the namespaces' access to ``/dev/net/tun``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import Row, Suite
from ringfence.network import AttachOptions, attach
from tests.framework.networks import Namespace, Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from benchmarks.results import Log

SECONDS = 3
SHORT = 2000
AT_ONCE = 1000
# The host keeps a port for a minute after a connection, for each destination: with few of them, the
# systems that come later pay for those before.
HOSTS = [f"198.51.100.{number}" for number in range(10, 74)]
_TUN = Path("/dev/net/tun")
_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
_MTU = "65520"
WORKS = ("TCP out", "TCP in", "short connections", "connections, 1,000 at once")

_CONNECT = """
import socket, sys, time
count, hosts = int(sys.argv[1]), sys.argv[2:]
start = time.monotonic()
for number in range(count):
    with socket.create_connection((hosts[number % len(hosts)], 7), timeout=10) as s:
        s.sendall(b"x")
        s.recv(1)
print(count / (time.monotonic() - start))
"""


_AT_ONCE = """
import resource, socket, sys, time
count, hosts = int(sys.argv[1]), sys.argv[2:]
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
start = time.monotonic()
ends = [(hosts[number % len(hosts)], 7) for number in range(count)]
many = [socket.create_connection(end, timeout=10) for end in ends]
for one in many:
    one.sendall(b"x")
for one in many:
    assert one.recv(1) == b"x"
print(count / (time.monotonic() - start))
"""


class _UserNamespace(Namespace):
    """A network namespace of an ordinary user."""

    def __init__(self) -> None:
        script = "ip link set lo up; echo ready; exec sleep infinity"
        self._rootless = True
        self._holder = subprocess.Popen(
            [*_USER, "unshare", "-Urn", "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        self._holder.stdout.readline()


@contextmanager
def _open_tun() -> Iterator[None]:
    """Users may open it meanwhile, as udev has it by default."""
    mode = _TUN.stat().st_mode & 0o777
    _TUN.chmod(0o666)
    try:
        yield
    finally:
        _TUN.chmod(mode)


@contextmanager
def _ringfence(guest: Namespace) -> Iterator[None]:
    with attach("user", f"bench{guest.pid}", "container", AttachOptions()) as attachment:
        attachment.enter(guest.pid)
        yield


@contextmanager
def _program(guest: Namespace, argv: list[str]) -> Iterator[None]:
    running = subprocess.Popen(
        [*argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 10
        while "default" not in guest.run("ip", "route").stdout:
            if time.monotonic() > deadline:
                message = f"{argv} did not come up"
                raise TimeoutError(message)
            time.sleep(0.1)
        yield
    finally:
        running.kill()
        running.wait()


def _slirp(guest: Namespace) -> AbstractContextManager[None]:
    argv = [
        "slirp4netns",
        "--configure",
        f"--mtu={_MTU}",
        "--userns-path",
        f"/proc/{guest.pid}/ns/user",
    ]
    return _program(guest, [*argv, str(guest.pid), "tap0"])


def _pasta(guest: Namespace) -> AbstractContextManager[None]:
    argv = [*_USER, "pasta", "--config-net", "--foreground", "--quiet", "-m", _MTU]
    return _program(guest, [*argv, str(guest.pid)])


def programs() -> dict[str, str]:
    """What connects, by the work that it is."""
    return {WORKS[2]: _CONNECT, WORKS[3]: _AT_ONCE}


@contextmanager
def outside() -> Iterator[Peer]:
    """A host outside with many addresses that serves iperf3, and a home of Ringfence's own."""
    with ExitStack() as stack:
        os.environ["RINGFENCE_HOME"] = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(os.environ.pop, "RINGFENCE_HOME", None)
        peer = stack.enter_context(Peer())
        for address in HOSTS:
            peer.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        server = peer.spawn("iperf3", "-s")
        stack.callback(server.communicate)
        stack.callback(server.kill)
        yield peer


def run(rounds: int, *, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How often each is done, the systems in turn.
        log: Gets a line for each step.
    """
    systems: dict[str, Callable[[Namespace], AbstractContextManager[None]]] = {
        "ringfence": _ringfence,
        "slirp4netns": _slirp,
        "pasta": _pasta,
    }
    suite = Suite(name="network: user mode", columns=tuple(systems))
    missing = [name for name in ("iperf3", "slirp4netns", "pasta") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        suite.notes.append(f"not run: needs root{''.join(f', {name}' for name in missing)}")
        return [suite]
    with _open_tun(), outside() as peer:
        for number in range(rounds):
            for name, start in systems.items():
                log(f"{suite.name}: round {number + 1} of {rounds}, {name}\n")
                with _UserNamespace() as guest, start(guest):
                    _measure(suite, guest, peer, name)
    _table(suite, tuple(systems))
    return [suite]


def _measure(suite: Suite, guest: Namespace, peer: Peer, system: str) -> None:
    for work, options in (("TCP out", ()), ("TCP in", ("-R",))):
        words = ("iperf3", "-c", peer.v4, "-t", str(SECONDS), "-J", *options)
        done = json.loads(guest.run(*words).stdout)
        if "error" in done:
            suite.notes.append(f"{system}, {work}: {done['error']}")
            continue
        bits = float(done["end"]["sum_received"]["bits_per_second"])
        suite.add(work, system, bits / 1e9, "Gbit/s")
    for (work, source), count in zip(programs().items(), (SHORT, AT_ONCE), strict=True):
        done = guest.run(sys.executable, "-IS", "-c", source, str(count), *HOSTS)
        if done.returncode == 0:
            suite.add(work, system, float(done.stdout), "1/s")
        else:
            suite.notes.append(f"{system}, {work}: {done.stderr.splitlines()[-1]}")


def _table(suite: Suite, systems: tuple[str, ...]) -> None:
    for work in WORKS:
        found = {name: suite.series.get(f"{work}/{name}") for name in systems}
        cells = tuple(
            f"{one.median:.3g} {one.unit}" if one is not None else "-" for one in found.values()
        )
        own = found["ringfence"]
        peers = [one.median for name, one in found.items() if one and name != "ringfence"]
        reached = own is not None and all(own.median >= other for other in peers)
        suite.rows.append(Row(name=work, cells=cells, reached=reached))

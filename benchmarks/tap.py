"""A virtual machine's network card on a TAP device, against QEMU's by its own translator, or by KVM.

The same stock kernel and programs in both, one vCPU. The TAP device is on a bridge, and the server is a
network namespace on the same bridge. By KVM each is measured with vhost-net too. Needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import programs, systems
from benchmarks.results import Row, Suite
from ringfence.network import links
from tests.framework.networks import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.results import Log
    from benchmarks.systems import Outcome, Work

_HOST, _SERVER, _GUEST = "10.96.0.1", "10.96.0.2", "10.96.0.3"
_SECONDS = 3
_SHORT = 500
_VHOST = ", vhost-net"
# KVM is measured on a processor that is emulated.
_TIMEOUT_S = {"bt": 180, "kvm": 600}
_WORKS = ("TCP out", "TCP in", "short connections")
_RATE = re.compile(r"([0-9.]+) Mbits/sec +receiver|([0-9.]+) Mbits/sec.*receiver")
_ECHO = """
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, request_queue_size = True, 1024
server = Server(("0.0.0.0", 7), Echo)
print("ready", flush=True)
server.serve_forever()
"""


def _iperf3() -> dict[str, Path]:
    """The host's iperf3 and its libraries."""
    program = shutil.which("iperf3") or "/usr/bin/iperf3"
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", listed)
    return {path.lstrip("/"): Path(path) for path in (program, *libraries)}


def _initramfs() -> Path:
    files = _iperf3()
    program = f"/{next(iter(files))}"
    client = f"{program}\t-c\t{_SERVER}\t-t\t{_SECONDS}\t-f\tm\t-i\t0"
    commands = [
        f"-\t/bench/link\t{_GUEST}",
        f"-\t{client}",
        f"-\t{client}\t-R",
        f"short\t/bench/connects\t{_SERVER}\t7\t{_SHORT}",
    ]
    modules = ("virtio_pci", "virtio_net")
    return programs.initramfs("tap", commands, modules, files)


@contextmanager
def _server(bridge: str) -> Iterator[None]:
    """A host on the bridge with iperf3 and an echo."""
    with Namespace() as server, ExitStack() as stack:
        links.add_veth("rftbench", "eth0", bridge, 1500, server.pid)
        for words in (
            ("addr", "add", f"{_SERVER}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            server.run("ip", *words)
        for argv in (("iperf3", "-s"), (sys.executable, "-IS", "-c", _ECHO)):
            running = server.spawn(*argv)
            stack.callback(running.communicate)
            stack.callback(running.kill)
        yield


@contextmanager
def _tap(bridge: str) -> Iterator[int]:
    (fd,) = links.add_tap("rftbench0", bridge, 1500)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _vhost(*, wanted: bool) -> Iterator[int | None]:
    fds = links.open_vhost(1) if wanted else [None]
    if not fds:
        message = "this host has no vhost-net"
        raise RuntimeError(message)
    yield fds[0]
    if fds[0] is not None:
        os.close(fds[0])


def run(rounds: int, *, engine: str = "bt", log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How often each is done, the systems in turn.
        engine: ``bt``, or ``kvm`` where there is a usable one.
        log: Gets a line for each step.
    """
    accel = {"bt": "tcg", "kvm": "kvm"}[engine]
    run_by: dict[str, Callable[[Work], Outcome]] = {
        f"ringfence {engine}": partial(systems.ours, engine=engine),
        f"QEMU {accel}": partial(systems.qemu, accel=accel),
    }
    if engine == "kvm":
        run_by |= {f"{name}{_VHOST}": start for name, start in run_by.items()}
    suite = Suite(name="network: TAP", columns=tuple(run_by))
    missing = [name for name in ("iperf3", "qemu-system-x86_64") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        suite.notes.append(f"not run: needs root{''.join(f', {name}' for name in missing)}")
        return [suite]
    bridge = "rfbbench"
    with ExitStack() as stack:
        links.remove(bridge)
        links.ensure_bridge(bridge, [f"{_HOST}/24"], 1500)
        stack.callback(links.remove, bridge)
        stack.enter_context(_server(bridge))
        initramfs = _initramfs()
        for number in range(rounds):
            for name, start in run_by.items():
                log(f"{suite.name}: round {number + 1} of {rounds}, {name}\n")
                with _tap(bridge) as tap, _vhost(wanted=name.endswith(_VHOST)) as vhost:
                    work = systems.Work(
                        initramfs=initramfs, tap=tap, vhost=vhost, timeout_s=_TIMEOUT_S[engine]
                    )
                    _take(suite, name, start(work))
    _table(suite, tuple(run_by))
    return [suite]


def _take(suite: Suite, system: str, outcome: Outcome) -> None:
    rates = [float(one or other) for one, other in _RATE.findall(outcome.text)]
    for work, rate in zip(("TCP out", "TCP in"), rates, strict=False):
        suite.add(work, system, rate / 1e3, "Gbit/s")
    if len(rates) != 2:
        suite.notes.append(f"{system}: {outcome.text[-500:]}")
    for timed in outcome.timed:
        if timed.name == "short" and timed.check == 0:
            suite.add("short connections", system, _SHORT / timed.seconds, "1/s")


def _table(suite: Suite, names: tuple[str, ...]) -> None:
    for work in _WORKS:
        found = [suite.series.get(f"{work}/{name}") for name in names]
        cells = tuple("-" if one is None else f"{one.median:.3g} {one.unit}" for one in found)
        own, peer = found[-2:]
        reached = own is not None and peer is not None and own.median >= peer.median
        suite.rows.append(Row(name=work, cells=cells, reached=reached))

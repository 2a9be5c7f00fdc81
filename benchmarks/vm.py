"""The VM process by itself: its memory, its start, and what its devices pass, against QEMU's."""

from __future__ import annotations

import functools
import math
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import programs, systems
from benchmarks.results import Row, Suite, seconds
from tests.framework.vm_process import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.results import Log
    from benchmarks.systems import Outcome

MEMORY_LIMIT_MIB = {"kvm": 8.0, "bt": 64.0}
START_LIMIT_S = 0.015
TRANSFERS = (
    *("disk-read-128M", "disk-read-4000x4K", "disk-write-64M"),
    *("share-read-64M", "share-1000-files"),
)


def run(rounds: int, *, engine: str, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How often each is done.
        engine: ``bt``, or ``kvm`` where there is a usable one.
        log: Gets a line for each step.
    """
    return [_process(rounds, engine, log), _devices(rounds, engine, log)]


def _process(rounds: int, engine: str, log: Log) -> Suite:
    suite = Suite(name=f"vm: process with {engine}", columns=("figure", "at most"))
    work = systems.Work(initramfs=programs.initramfs("idle", ["-\t/bench/idle"]))
    for number in range(rounds):
        log(f"{suite.name}: round {number + 1} of {rounds}\n")
        with ExitStack() as stack:
            process = systems.prepare(work, engine, stack)
            start = time.monotonic()
            vm = stack.enter_context(process)
            ready = vm.wait_ready()
            suite.add("start to kernel entry", engine, time.monotonic() - start)
            phases = ready["start_phases_us"]
            assert isinstance(phases, dict)
            for name, microseconds in phases.items():
                suite.add(f"phase {name}", engine, float(microseconds) / 1e6)
            vm.wait_serial("@ idle", TIMEOUT_S)
            # What the guest does at its start is over a moment later.
            time.sleep(1)
            suite.add("memory beyond guest RAM", engine, private_mib(vm.process.pid), "MiB")
    entry = suite.median("start to kernel entry", engine)
    memory, limit = suite.median("memory beyond guest RAM", engine), MEMORY_LIMIT_MIB[engine]
    rows = [
        ("start to kernel entry", seconds(entry), seconds(START_LIMIT_S), entry <= START_LIMIT_S),
        ("memory beyond guest RAM", f"{memory:.1f} MiB", f"{limit:g} MiB", memory <= limit),
    ]
    suite.rows = [Row(name=name, cells=(cell, most), reached=ok) for name, cell, most, ok in rows]
    for key in suite.series:
        if key.startswith("phase "):
            name = key.removesuffix(f"/{engine}")
            suite.rows.append(Row(name=name, cells=(seconds(suite.median(name, engine)), "")))
    return suite


def private_mib(pid: int) -> float:
    """What a process and its children hold for themselves, without the guest's RAM.

    Private pages, and those of the engine's own memfds, which are mapped more than once.
    """
    total_kib = 0
    for process in _family(pid):
        counted = "Private_"
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                counted = "Pss:" if "/memfd:" in line else "Private_"
                if "/memfd:ringfence-ram" in line:
                    counted = "nothing"
            elif line.startswith(counted):
                total_kib += int(line.split()[1])
    return total_kib / 1024


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        found += [int(child) for child in children.split()]
    return found


def _devices(rounds: int, engine: str, log: Log) -> Suite:
    accel = "tcg" if engine == "bt" else "kvm"
    columns = (engine, f"QEMU ({accel})", "QEMU/ours", "at least")
    suite = Suite(name=f"vm: devices with {engine}", columns=columns)
    commands = ["-\t/bench/disk", "-\t/bench/share"]
    initramfs = programs.initramfs("devices", commands, ("virtio_pci", "virtio_blk", "virtiofs"))
    work = systems.Work(initramfs=initramfs, disk=_disk(), share=_share())
    runs: dict[str, Callable[[], Outcome]] = {
        engine: functools.partial(systems.ours, work, engine),
        "QEMU": functools.partial(systems.qemu, work, "q35", accel),
    }
    for number in range(rounds):
        for system, start in runs.items():
            log(f"{suite.name}: round {number + 1} of {rounds}: {system}\n")
            try:
                outcome = start()
            except (RuntimeError, TimeoutError, ConnectionError) as error:
                suite.notes.append(f"{system}, round {number + 1}: {str(error)[-400:]}")
                continue
            for timed in outcome.timed:
                if timed.name in TRANSFERS:
                    log(f"  {timed.name} {timed.seconds:.3f} s\n")
                    suite.add(timed.name, system, timed.seconds)
    for name in TRANSFERS:
        ratio = suite.ratio(name, "QEMU", engine)
        times = [seconds(suite.median(name, system)) for system in runs]
        reached = not math.isnan(ratio) and ratio >= 1
        suite.rows.append(Row(name=name, cells=(*times, f"{ratio:.2f}", "1"), reached=reached))
    return suite


def _disk() -> Path:
    path = programs.CACHE / "disk.img"
    if not path.exists():
        path.write_bytes(bytes(range(256)) * (1 << 19))
    return path


def _share() -> Path:
    folder = programs.CACHE / "share"
    small = folder / "small"
    if not (small / "999").exists():
        small.mkdir(parents=True, exist_ok=True)
        (folder / "big").write_bytes(bytes(range(256)) * (1 << 18))
        for number in range(1000):
            (small / str(number)).write_bytes(b"x" * 4000)
    return folder

"""From the start of the process to the guest's first program, against QEMU with the same kernel and initramfs."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from benchmarks import programs, systems
from benchmarks.results import Row, Suite, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.results import Log
    from benchmarks.systems import Outcome

MICROVM = "microvm,x-option-roms=off,rtc=on,auto-kernel-cmdline=off"
# Our engine, QEMU's, and how many times faster we have to be.
PEERS = {"bt": ("tcg", 2.0), "kvm": ("kvm", 1.0)}


def run(rounds: int, *, engine: str, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How often each system boots.
        engine: ``bt``, or ``kvm`` where there is a usable one.
        log: Gets a line for each step.
    """
    accel, least = PEERS[engine]
    columns = ("to init", "whole", "against microvm", "at least")
    suite = Suite(name=f"boot: {engine}", columns=columns)
    work = systems.Work(initramfs=programs.initramfs("empty", []), timeout_s=120)
    runs: dict[str, Callable[[], Outcome]] = {
        engine: functools.partial(systems.ours, work, engine),
        "QEMU microvm": functools.partial(systems.qemu, work, MICROVM, accel),
        "QEMU q35": functools.partial(systems.qemu, work, "q35", accel),
    }
    for number in range(rounds):
        for system, start in runs.items():
            log(f"{suite.name}: round {number + 1} of {rounds}: {system}\n")
            try:
                outcome = start()
            except (RuntimeError, TimeoutError, ConnectionError) as error:
                suite.notes.append(f"{system}, round {number + 1}: {str(error)[-400:]}")
                continue
            # A run that is cut off has said what it had.
            log(f"  to init {outcome.first_s:.3f} s, whole {outcome.whole_s:.3f} s\n")
            suite.add("to init", system, outcome.first_s)
            suite.add("whole", system, outcome.whole_s)
    for system in runs:
        faster = suite.ratio("to init", "QEMU microvm", system)
        target = f"{least:g}" if system == engine else ""
        reached = not math.isnan(faster) and faster >= least if system == engine else None
        times = [seconds(suite.median(what, system)) for what in ("to init", "whole")]
        suite.rows.append(
            Row(name=system, cells=(*times, f"{faster:.2f}", target), reached=reached)
        )
    suite.notes.append(
        "QEMU's microvm has no power-off: its whole time ends with the last line of the guest."
    )
    return [suite]

"""The ``bt`` engine against the host itself and against QEMU's translator, with the same programs and kernel.

Every round runs each system once, one after the other, so that what else the host does falls on all alike.
Figures are medians over rounds and repetitions.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from benchmarks import debian, programs, systems
from benchmarks.results import Row, Suite, geometric_mean, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.results import Log
    from benchmarks.systems import Outcome

COMPUTE = ("sieve", "calls", "quicksort", "chase", "doubles", "matrix", "copy")
KERNEL = ("syscalls", "forks", "faults", "pipes")
COLUMNS = ("native", "bt", "tcg", "bt/native", "at most", "tcg/bt", "at least")


def targets(work: str) -> tuple[float | None, float | None]:
    """At most so many times native, at least so many times faster than QEMU's translator."""
    if work in COMPUTE:
        least = {"chase": 1.5, "copy": 1.5, "matrix": 40.0}
        return 3.0, least.get(work, 3.0)
    if work in KERNEL:
        return None, 1.5
    return debian.TARGETS[work]


def run(rounds: int, *, whole: bool, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How often each system runs.
        whole: Also whole programs on a Debian root, which is built once (needs root).
        log: Gets a line for each step.
    """
    suites = [_micro(rounds, log), _threads(rounds, log)]
    if whole:
        suites.append(_whole(rounds, log))
    return suites


def _measure(suite: Suite, rounds: int, runs: dict[str, Callable[[], Outcome]], log: Log) -> None:
    """Runs every system in turn, and checks that all computed the same."""
    checks: dict[str, int] = {}
    for number in range(rounds):
        for system, start in runs.items():
            log(f"{suite.name}: round {number + 1} of {rounds}: {system}\n")
            try:
                outcome = start()
            except (RuntimeError, TimeoutError, ConnectionError) as error:
                suite.notes.append(f"{system}, round {number + 1}: {str(error)[-400:]}")
                continue
            suite.add("whole run", system, outcome.whole_s)
            wrong = [line.strip() for line in outcome.text.splitlines() if line.startswith("! ")]
            suite.notes += [f"{system}, round {number + 1}: {line[2:]}" for line in wrong]
            for timed in outcome.timed:
                if timed.name in {"init", "end"}:
                    continue
                suite.add(timed.name, system, timed.seconds)
                if checks.setdefault(timed.name, timed.check) != timed.check:
                    suite.notes.append(f"{system} computed another {timed.name}: {timed.check}")


def _row(suite: Suite, work: str) -> Row:
    most, least = targets(work)
    slower, faster = suite.ratio(work, "bt", "native"), suite.ratio(work, "tcg", "bt")
    reached = _holds(slower, most) and _holds(-faster, None if least is None else -least)
    times = [seconds(suite.median(work, system)) for system in ("native", "bt", "tcg")]
    return Row(
        name=work,
        cells=(*times, f"{slower:.2f}", _limit(most), f"{faster:.2f}", _limit(least)),
        reached=reached,
    )


def _holds(value: float, limit: float | None) -> bool:
    return limit is None or (not math.isnan(value) and value <= limit)


def _limit(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _micro(rounds: int, log: Log) -> Suite:
    suite = Suite(name="bt: programs", columns=COLUMNS)
    commands = [f"-\t/bench/{name}" for name in programs.MICRO]
    work = systems.Work(initramfs=programs.initramfs("micro", commands))
    runs: dict[str, Callable[[], Outcome]] = {
        "native": functools.partial(systems.native, commands),
        "bt": functools.partial(systems.ours, work),
        "tcg": functools.partial(systems.qemu, work),
    }
    _measure(suite, rounds, runs, log)
    suite.rows = [_row(suite, name) for name in (*COMPUTE, *KERNEL)]
    slower = geometric_mean([suite.ratio(name, "bt", "native") for name in COMPUTE])
    faster = geometric_mean([suite.ratio(name, "tcg", "bt") for name in COMPUTE])
    mean = ("", "", "", f"{slower:.2f}", "1.8", f"{faster:.2f}", "5")
    suite.rows.insert(
        0, Row(name="compute, mean", cells=mean, reached=slower <= 1.8 and faster >= 5)
    )
    boot = (
        *(
            [
                "",
                seconds(suite.median("whole run", "bt")),
                seconds(suite.median("whole run", "tcg")),
            ]
        ),
    )
    faster = suite.ratio("whole run", "tcg", "bt")
    suite.rows.append(
        Row(name="whole run", cells=(*boot, "", "", f"{faster:.2f}", ""), reached=None)
    )
    return suite


def _threads(rounds: int, log: Log) -> Suite:
    """Twice the work by two threads: how many times one thread's work a second is done."""
    suite = Suite(name="bt: two vCPUs", columns=("one thread", "two threads", "work", "at least"))
    commands = ["-\t/bench/threads"]
    work = systems.Work(initramfs=programs.initramfs("threads", commands), vcpus=2)
    runs: dict[str, Callable[[], Outcome]] = {
        "native": functools.partial(systems.native, commands),
        "bt": functools.partial(systems.ours, work),
    }
    _measure(suite, rounds, runs, log)
    for system in runs:
        one, two = (suite.median(f"thread-{count}", system) for count in ("one", "two"))
        done = 2 * one / two
        target, reached = ("1.9", done >= 1.9) if system == "bt" else ("", None)
        cells = (seconds(one), seconds(two), f"{done:.2f}", target)
        suite.rows.append(Row(name=system, cells=cells, reached=reached))
    return suite


def _whole(rounds: int, log: Log) -> Suite:
    suite = Suite(name="bt: whole programs", columns=COLUMNS)
    root = debian.build(log)
    commands: Sequence[str] = debian.commands()
    modules = ("virtio_pci", "virtio_blk", "ext4")
    initramfs = programs.initramfs("whole", commands, modules, disk_is_root=True)
    work = systems.Work(initramfs=initramfs, memory_mib=1024, disk=root.image, timeout_s=900)
    runs: dict[str, Callable[[], Outcome]] = {
        "native": functools.partial(systems.native, commands, root.folder),
        "bt": functools.partial(systems.ours, work),
        "tcg": functools.partial(systems.qemu, work),
    }
    _measure(suite, rounds, runs, log)
    suite.rows = [_row(suite, name) for name in debian.TARGETS]
    return suite

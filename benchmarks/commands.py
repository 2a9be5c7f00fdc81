"""What a user waits for: the command's own start, a machine's phases, and a command in a running machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import Row, Suite, seconds
from ringfence import Machine

if TYPE_CHECKING:
    from benchmarks.results import Log
    from ringfence.machine.spec import EngineName

RINGFENCE = Path(sys.executable).with_name("ringfence")
START_LIMIT_S = 0.1
COMMANDS = 20
STREAM_MIB = 100


def run(rounds: int, *, engine: EngineName, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How many machines are started.
        engine: That runs them.
        log: Gets a line for each step.
    """
    suite = Suite(name=f"commands: {engine}", columns=("figure", "at most"))
    for number in range(rounds):
        log(f"{suite.name}: round {number + 1} of {rounds}\n")
        for _ in range(5):
            start = time.monotonic()
            subprocess.run([RINGFENCE, "--help"], stdout=subprocess.DEVNULL, check=True)
            suite.add("ringfence --help", engine, time.monotonic() - start)
        start = time.monotonic()
        argv = [str(RINGFENCE), "run", "--engine", engine, "--", "true"]
        subprocess.run(argv, check=True)
        suite.add("ringfence run -- true, whole", engine, time.monotonic() - start)
        _in_machine(suite, engine)
    for key, series in suite.series.items():
        name = key.removesuffix(f"/{engine}")
        limit = START_LIMIT_S if name == "ringfence --help" else None
        figure = f"{series.median:.0f} MB/s" if series.unit == "MB/s" else seconds(series.median)
        reached = None if limit is None else series.median <= limit
        cells = (figure, "" if limit is None else seconds(limit))
        suite.rows.append(Row(name=name, cells=cells, reached=reached))
    return [suite]


def _in_machine(suite: Suite, engine: EngineName) -> None:
    with Machine(engine=engine) as machine:
        for phase, taken in machine.timing.items():
            suite.add(f"phase {phase}", engine, taken)
        for _ in range(COMMANDS):
            start = time.monotonic()
            result = machine.run(["true"], check=True)
            suite.add("run true in a machine", engine, time.monotonic() - start)
            for part, taken in result.timing.items():
                suite.add(f"run true in a machine: {part}", engine, taken)
        script = f"head -c {STREAM_MIB << 20} /dev/zero"
        start = time.monotonic()
        output = machine.run(["sh", "-c", script], check=True).stdout_bytes
        suite.add(
            f"{STREAM_MIB} MiB through stdout",
            engine,
            STREAM_MIB * 1.048576 / (time.monotonic() - start),
            "MB/s",
        )
    assert hashlib.sha256(output).digest() == hashlib.sha256(bytes(STREAM_MIB << 20)).digest()

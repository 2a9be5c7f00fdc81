"""Containers: the runtime beside runc as whole processes, and machines from a running Python.

The systems take turns, so that whatever else the host does falls on all of them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ringfence
from benchmarks.results import REPOSITORY, Row, Suite, seconds

if TYPE_CHECKING:
    from benchmarks.results import Log

_SCRIPT = REPOSITORY / "packaging/data/scripts/ringfence-oci"
_RUNS_A_ROUND = 20
_FIRST_OUTPUT_S = 0.010
_SETTLE_S = 0.5


def run(rounds: int, *, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: Each is 20 runs of every system.
        log: Gets a line for each step.
    """
    suite = Suite(name="containers", columns=("median", "target"))
    with tempfile.TemporaryDirectory(prefix="rf-bench-") as name:
        bundle = _bundle(Path(name))
        ours = [sys.executable, "-I", "-S", "-E", str(_SCRIPT), "run", "--bundle", str(bundle)]
        ways = {"ringfence-oci": ours}
        for peer in ("runc", "crun"):
            program = shutil.which(peer)
            if program and _runs([program, "run", "--bundle", str(bundle), "rf-bench-probe"]):
                ways[peer] = [program, "run", "--bundle", str(bundle)]
        for number in range(rounds):
            log(f"containers: round {number + 1} of {rounds}\n")
            for turn in range(_RUNS_A_ROUND):
                for system, command in ways.items():
                    began = time.perf_counter()
                    subprocess.run([*command, f"rf-bench-{turn}"], check=True)
                    suite.add("run of a no-op bundle", system, time.perf_counter() - began)
            # By themselves: the kernel takes the others' namespaces apart long after their ends.
            time.sleep(_SETTLE_S)
            for _turn in range(_RUNS_A_ROUND):
                suite.add("create to first output", "ringfence", _first_output())
    for system in ways:
        own = suite.median("run of a no-op bundle", "ringfence-oci")
        median = suite.median("run of a no-op bundle", system)
        reached = own <= median if system == "runc" else None
        cells = (seconds(median), "not less than ringfence-oci" if system == "runc" else "")
        suite.rows.append(
            Row(name=f"run of a no-op bundle: {system}", cells=cells, reached=reached)
        )
    median = suite.median("create to first output", "ringfence")
    cells = (seconds(median), seconds(_FIRST_OUTPUT_S))
    row = Row(
        name="create to first output, in Python", cells=cells, reached=median < _FIRST_OUTPUT_S
    )
    suite.rows.append(row)
    suite.notes.append("crun is left out where it refuses the host, as it does with hybrid cgroups")
    return [suite]


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _first_output() -> float:
    began = time.perf_counter()
    with ringfence.Machine(engine="container", network="none") as machine:
        output = machine.run(["echo", "x"]).stdout
        took = time.perf_counter() - began
    assert output == "x\n"
    return took


def _bundle(folder: Path) -> Path:
    busybox = shutil.which("busybox")
    if busybox is None:
        message = "a static busybox is needed for the bundle: apt install busybox-static"
        raise FileNotFoundError(message)
    for name in ("bin", "proc", "dev", "sys"):
        (folder / "rootfs" / name).mkdir(parents=True)
    shutil.copy(busybox, folder / "rootfs/bin/true")
    command = [sys.executable, "-I", "-S", "-E", str(_SCRIPT), "spec", "--bundle", str(folder)]
    subprocess.run(command, check=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["process"].update(args=["/bin/true"], terminal=False)
    path.write_text(json.dumps(config))
    return folder

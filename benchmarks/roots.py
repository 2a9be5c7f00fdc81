"""An image as a virtual machine's root: its EROFS disk beside the same files shared by virtio-fs.

The shared directory is the image's merged tree, which is the best that sharing layers could be: the
guest joins none.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import TYPE_CHECKING

import ringfence
from benchmarks import debian
from benchmarks.results import Row, Suite, seconds
from ringfence.image import Store
from ringfence.image.create import from_directory

if TYPE_CHECKING:
    from benchmarks.results import Log
    from ringfence.machine.options import MachineOptions
    from ringfence.machine.spec import EngineName

# Each reads what no earlier one has read, but for the last.
_WORK = {
    "python3 and 30 modules": "python3 -c 'import json, email.message, asyncio, unittest, sqlite3'",
    "find /usr": "find /usr > /dev/null",
    "tar of /usr/lib": "tar cf - /usr/lib | cat > /dev/null",
    "tar of /usr/lib, again": "tar cf - /usr/lib | cat > /dev/null",
}
_START = "to the first output"


def run(rounds: int, *, engine: EngineName, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How many machines of each.
        engine: ``bt``, or ``kvm`` where there is a usable one.
        log: Gets a line for each step.
    """
    columns = ("EROFS disk", "virtio-fs", "faster by")
    suite = Suite(name=f"an image as a root: {engine}", columns=columns)
    folder = debian.build(log).folder
    home = os.environ.get("RINGFENCE_HOME")
    with tempfile.TemporaryDirectory(prefix="rf-bench-") as name:
        os.environ["RINGFENCE_HOME"] = name
        try:
            from_directory(Store(), folder, "bench:1")
            common: MachineOptions = {"engine": engine, "network": "none", "memory": "1G"}
            roots: dict[str, MachineOptions] = {
                "disk": {**common, "image": "bench:1"},
                "shared": {**common, "root": folder},
            }
            # The disk is made once, by the first machine of an image.
            _one(roots["disk"])
            for number in range(rounds):
                for system, options in roots.items():
                    log(f"{suite.name}: round {number + 1} of {rounds}: {system}\n")
                    for work, took in _one(options).items():
                        suite.add(work, system, took)
        finally:
            del os.environ["RINGFENCE_HOME"]
            if home is not None:
                os.environ["RINGFENCE_HOME"] = home
    for work in (_START, *_WORK):
        times = [seconds(suite.median(work, system)) for system in ("disk", "shared")]
        faster = suite.ratio(work, "shared", "disk")
        suite.rows.append(Row(name=work, cells=(*times, f"{faster:.2f}"), reached=None))
    return [suite]


def _one(options: MachineOptions) -> dict[str, float]:
    times = {}
    began = time.perf_counter()
    with ringfence.Machine(**options) as machine:
        machine.run(["true"], check=True)
        times[_START] = time.perf_counter() - began
        for work, script in _WORK.items():
            began = time.perf_counter()
            machine.run(["sh", "-c", script], check=True)
            times[work] = time.perf_counter() - began
    return times

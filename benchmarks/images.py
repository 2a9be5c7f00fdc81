"""Unpacking an image of 10,000 files: whole processes, from an OCI layout to files on disk, against others."""

from __future__ import annotations

import functools
import gzip
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import REPOSITORY, Row, Suite, seconds
from ringfence.image import Store
from ringfence.image.create import from_tar
from ringfence.image.export import ArchiveFormat, export_images

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.results import Log

_DIRECTORIES, _FILES_EACH, _LARGE = 500, 20, 20
_LARGE_BYTES = 2_300_000


def run(rounds: int, *, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How often each unpacks.
        log: Gets a line for each step.
    """
    suite = Suite(
        name="images: unpack",
        columns=("whole", "processor", "ours is faster by", "in processor time"),
    )
    with tempfile.TemporaryDirectory(prefix="rf-bench-") as name:
        work = Path(name)
        log("images: making an image of 10,000 files\n")
        size = _image(work / "image")
        ways: dict[str, Callable[[Path], list[list[str]]]] = {"ours": _ours}
        if shutil.which("umoci"):
            ways["skopeo and umoci"] = _umoci
        if shutil.which("podman"):
            ways["podman"] = _podman
        for number in range(rounds):
            for system, commands in ways.items():
                log(f"{suite.name}: round {number + 1} of {rounds}: {system}\n")
                passed, spent = _timed(work, functools.partial(commands, work))
                suite.add("unpack", system, passed)
                suite.add("unpack, processor time", system, spent)
        for system in ways:
            whole = suite.median("unpack", system)
            spent = suite.median("unpack, processor time", system)
            faster = suite.ratio("unpack", system, "ours")
            cheaper = suite.ratio("unpack, processor time", system, "ours")
            cells = (seconds(whole), seconds(spent), f"{faster:.2f}", f"{cheaper:.2f}")
            reached = None if system == "ours" else faster >= 1
            suite.rows.append(Row(name=system, cells=cells, reached=reached))
        suite.notes.append(
            f"{size / 1e6:.0f} MB in {_DIRECTORIES * _FILES_EACH + _LARGE} files, one gzip layer."
        )
    return [suite]


def _image(folder: Path) -> int:
    """An OCI layout, by our own store; returns the bytes of its files."""
    chance = random.Random(1)  # noqa: S311 - contents of files
    words = [chance.randbytes(chance.randint(3, 12)) for _ in range(3000)]
    buffer = io.BytesIO()
    total = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, size: int) -> None:
            nonlocal total
            info = tarfile.TarInfo(name)
            data = b"".join(chance.choices(words, k=size // 7 + 1))[:size]
            info.size, info.mtime, info.mode = len(data), 1_700_000_000, 0o644
            tar.addfile(info, io.BytesIO(data))
            total += len(data)

        for directory in range(_DIRECTORIES):
            info = tarfile.TarInfo(f"d{directory}")
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
            for file in range(_FILES_EACH):
                size = min(int(chance.lognormvariate(8.2, 1.2)), 400_000)
                add(f"d{directory}/f{file}", size)
        for large in range(_LARGE):
            add(f"large{large}", _LARGE_BYTES)
    store = Store(folder.with_name("origin"))
    from_tar(store, io.BytesIO(gzip.compress(buffer.getvalue(), 1)), "bench:1")
    export_images(store, ["bench:1"], folder, ArchiveFormat.OCI)
    return total


def _ours(work: Path) -> list[list[str]]:
    code = "import sys; from ringfence.cli import main; sys.exit(main())"
    return [[sys.executable, "-c", code, "image", "import", "--unpack", str(work / "image")]]


def _umoci(work: Path) -> list[list[str]]:
    image = work / "image"
    return [
        ["skopeo", "copy", "-q", f"oci:{image}:1", f"oci:{work / 'out' / 'copy'}:1"],
        ["umoci", "unpack", "--image", f"{work / 'out' / 'copy'}:1", str(work / "out" / "bundle")],
    ]


def _podman(work: Path) -> list[list[str]]:
    out = work / "out"
    roots = ["--root", str(out / "root"), "--runroot", str(out / "run")]
    return [["podman", *roots, "pull", "-q", f"oci:{work / 'image'}:1"]]


def _timed(work: Path, commands: Callable[[], list[list[str]]]) -> tuple[float, float]:
    """Time from start to end, and processor time of all processes."""
    out = work / "out"
    out.mkdir()
    environment = {
        **os.environ, "RINGFENCE_HOME": str(out), "PYTHONPATH": str(REPOSITORY / "src"),
    }  # fmt: skip
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    for command in commands():
        subprocess.run(command, check=True, capture_output=True, env=environment)
    passed = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    unmount = ["umount", str(out / "root" / "overlay")]
    subprocess.run(unmount, check=False, capture_output=True)  # podman leaves it mounted
    shutil.rmtree(out)
    return passed, spent

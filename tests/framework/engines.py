"""Container engines as processes: their daemons, their clients, what they are given to run."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.framework.bundles import make_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "answers",
    "containerd_config",
    "daemon",
    "make_archive",
    "make_runtime",
    "need",
    "run",
    "unmount_below",
]

_SCRIPT = Path(__file__).resolve().parents[2] / "packaging/data/scripts/ringfence-oci"
# On a busy host; nothing waits so long otherwise.
_READY_S = 90


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} isn't installed on this host")
    return path


def run(*words: str | Path, status: int = 0, timeout_s: float = 120) -> str:
    """Runs a program and returns what it wrote; a file, since engines' helpers keep pipes open.

    Not where we are: conmon leaves a file ``oom`` in its working directory.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=place,
            timeout=timeout_s, check=False,
        )  # fmt: skip
        output.seek(0)
        text = output.read().decode()
    assert done.returncode == status, f"{words}: {done.returncode}\n{text}"
    return text


@contextmanager
def daemon(log: Path, ready: Callable[[], bool], *words: str | Path) -> Iterator[int]:
    """A daemon, until it is stopped."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=log.parent,
        )
    try:
        end = time.monotonic() + _READY_S
        while not ready():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(*words: str | Path) -> bool:
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


def make_runtime(folder: Path) -> Path:
    """The runtime as an installation has it: the script, with an interpreter of its own."""
    path = folder / "ringfence-oci"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S -E "{_SCRIPT}" "$@"\n')
    path.chmod(0o755)
    return path


def make_archive(folder: Path) -> Path:
    """A root file system as a tar."""
    root = make_root(folder / "root")
    path = folder / "root.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname=".")
    return path


def containerd_config(place: Path) -> tuple[Path, Path]:
    """A configuration of containerd with everything below a directory, and its socket."""
    socket, path = place / "s.sock", place / "config.toml"
    path.write_text(
        f'version = 2\nroot = "{place}/root"\nstate = "{place}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\n  address = "{socket}"\n'
    )
    return path, socket


def unmount_below(folder: Path) -> None:
    """Takes away what daemons leave mounted when they end."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    places = [line.split()[4] for line in lines]
    for place in reversed(places):
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", place], check=False)

"""Bundles for container tests: a root of one static program, and the runtime as a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

__all__ = ["Runtime", "busybox", "left_behind", "make_bundle", "make_root", "namespaces_held"]

_APPLETS = [
    "grep",
    "tr",
    "sh",
    "true",
    "ls",
    "cat",
    "echo",
    "sleep",
    "ps",
    "id",
    "mount",
    "kill",
    "env",
    "stat",
    "readlink",
    "touch",
    "mkdir",
    "mknod",
    "chmod",
    "head",
    "wc",
    "hostname",
    "date",
    "dd",
    "find",
    "ln",
    "rm",
    "test",
    "tty",
    "stty",
    "ip",
    "unshare",
]
# As the installed script starts: by the interpreter alone, with the package and what it depends on.
_SCRIPT = "import sys; sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]; from ringfence.container.oci.main import main; sys.exit(main())"
_PACKAGES = sysconfig.get_path("purelib")
_SOURCES = Path(__file__).resolve().parents[2] / "src"


def busybox() -> Path:
    """A static program of many names; skips the test where there is none."""
    for place in ("/bin/busybox", "/usr/bin/busybox"):
        path = Path(place)
        if (
            path.exists()
            and b"statically"
            in subprocess.run(["file", "-L", path], capture_output=True, check=False).stdout
        ):
            return path
    pytest.skip("no static busybox on this host: apt install busybox-static")


def make_root(root: Path) -> Path:
    """A root file system of one static program."""
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox(), root / "bin/busybox")
    for name in _APPLETS:
        (root / "bin" / name).unlink(missing_ok=True)
        (root / "bin" / name).symlink_to("busybox")
    return root


def make_bundle(folder: Path, *command: str, **changes: object) -> Path:
    """A bundle that runs a command; ``changes`` are merged into its configuration."""
    make_root(folder / "rootfs")
    runtime = Runtime(folder / "states")
    (folder / "config.json").unlink(missing_ok=True)
    rootless = ["--rootless"] if changes.pop("rootless", False) else []
    runtime("spec", "--bundle", str(folder), *rootless)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["process"].update(args=list(command), terminal=False)
    config["root"]["readonly"] = False
    _merge(config, changes)
    path.write_text(json.dumps(config))
    return folder


def _merge(into: dict[str, object], changes: dict[str, object]) -> None:
    for name, value in changes.items():
        present = into.get(name)
        if isinstance(present, dict) and isinstance(value, dict):
            _merge(present, value)
        elif isinstance(present, list) and isinstance(value, list):
            into[name] = present + value
        else:
            into[name] = value


class Runtime:
    """``ringfence-oci`` with its own directory of states.

    Args:
        states: The directory.
    """

    def __init__(self, states: Path) -> None:
        self.states = states

    def command(self, *words: str) -> list[str]:
        start = [sys.executable, "-I", "-S", "-E", "-c", _SCRIPT, str(_SOURCES), _PACKAGES]
        return [*start, "--root", str(self.states), *words]

    def __call__(self, *words: str, status: int = 0, timeout_s: float = 30) -> str:
        """Runs a command, checks its exit status, returns its output."""
        # Into a file: a container that goes on would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                self.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
            output.seek(0)
            text = output.read().decode()
        assert done.returncode == status, f"{words}: {done.returncode}\n{text}"
        return text

    def status(self, name: str) -> str:
        return str(json.loads(self("state", name))["status"])

    def pid(self, name: str) -> int:
        return int(json.loads(self("state", name))["pid"])


def left_behind(*names: str) -> list[str]:
    """What of containers is still on the host: mounts, cgroups, processes."""

    def is_of_one(text: str) -> bool:
        return any(name in text for name in names)

    found = [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if is_of_one(line)
    ]
    for folder, below, _files in os.walk("/sys/fs/cgroup"):
        found += [f"{folder}/{entry}" for entry in below if is_of_one(entry)]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # One that has ended and waits for init to take its status is gone.
            ended = (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            if not ended and is_of_one((process / "cgroup").read_text()):
                found.append(f"process {process.name}")
        except OSError:
            continue
    return found


def namespaces_held(wanted: set[str]) -> set[str]:
    """Those of some namespaces (``net:[4026532000]``) that a process is in or has open."""
    held: set[str] = set()
    for pattern in ("[0-9]*/ns/*", "[0-9]*/fd/*"):
        for path in Path("/proc").glob(pattern):
            try:
                held.add(str(path.readlink()))
            except OSError:
                continue
    return held & wanted

"""The Rust programs that tests run, built once a session."""

from __future__ import annotations

import functools
import json
import struct
import subprocess
from pathlib import Path

from tools.build_binaries import build_static

REPOSITORY = Path(__file__).resolve().parents[2]


@functools.cache
def built_program(package: str, name: str, *, features: tuple[str, ...] = ()) -> Path:
    """Builds a package's program and returns where it is.

    Args:
        package: The crate.
        name: The program's name.
        features: Cargo features.
    """
    command = ["cargo", "build", "--locked", "--message-format=json", "-p", package, "--bin", name]
    if features:
        command += ["--features", ",".join(features)]
    built = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == name:
            return Path(message["executable"])
    message = f"cargo built no {name}"
    raise AssertionError(message)


def vm_program() -> Path:
    """``ringfence-vm`` as it is shipped, but for its optimization."""
    return built_program("ringfence-vm", "ringfence-vm")


def vm_testing_program() -> Path:
    """``ringfence-vm`` with an engine whose processors only wait, and with the misdeeds."""
    return built_program("ringfence-vm", "ringfence-vm-testing", features=("testing",))


@functools.cache
def agent_program() -> Path:
    """``ringfence-agent`` as guests run it."""
    return build_static("ringfence-agent")


def write_minimal_kernel(path: Path) -> Path:
    """An ELF image of one page at 16 MiB: a kernel to load, not to run."""
    code = b"\xf4" * 4096
    start = 16 << 20
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01" + bytes(9), 2, 62, 1, start, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    program = struct.pack("<IIQQQQQQ", 1, 7, 120, start, start, len(code), len(code), 4096)
    path.write_bytes(header + program + code)
    return path

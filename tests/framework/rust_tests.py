"""The project's Rust tests as programs, to be run in other hosts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def built_tests(package: str, target: str, *further: str) -> Path:
    """Builds a package's tests and returns the program.

    Args:
        package: The crate.
        target: The test's name; the crate's own for those in the library.
        further: For cargo.
    """
    command = ["cargo", "test", "--locked", "--no-run", "--message-format=json", "-p", package]
    built = subprocess.run([*command, *further], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    programs = [
        Path(message["executable"])
        for message in map(json.loads, built.stdout.splitlines())
        if message.get("executable") and message["target"]["name"] == target
    ]
    assert len(programs) == 1, programs
    return programs[0]

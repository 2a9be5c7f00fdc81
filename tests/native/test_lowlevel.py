"""Machines in this process, by the engine that runs anywhere; tests/functional/kvm has the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ringfence import lowlevel

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of this repository: guests, signals and their handlers stay out of the tests'."""
    command = [sys.executable, *argv]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


def test_what_it_promises_holds_without_kvm() -> None:
    done = run("-m", "tests.native.lowlevel_checks", "bt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed, 0 failed" in done.stdout


def test_the_example_runs_on_any_host() -> None:
    done = run("examples/handwritten_guest.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello from ring 0\nthe guest stopped at 0x100c\n"


def test_a_machine_says_what_runs_it() -> None:
    assert lowlevel.Machine(engine="bt", memory_mib=1).engine == "bt"
    assert lowlevel.Machine(memory_mib=1).engine in lowlevel.engines()

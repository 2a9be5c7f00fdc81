"""Fuzzes every surface for a bounded time: many seeds of each body that the suite runs with few.

``RINGFENCE_FUZZ_RUNS`` says how many (the default takes minutes), ``RINGFENCE_FUZZ_CASES`` how many pieces of random
code the bt engine and the host's processor are compared on. Coverage-guided fuzzing is in fuzz/README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_RUNS = "20000"
DEFAULT_CASES = "1000000"


def main() -> int:
    """Runs the bodies."""
    environment = {**os.environ}
    environment.setdefault("RINGFENCE_FUZZ_RUNS", DEFAULT_RUNS)
    bodies = ["cargo", "test", "--locked", "--release", "-p", "ringfence-fuzz-harness"]
    failed = subprocess.run(bodies, cwd=REPOSITORY, env=environment, check=False).returncode
    cases = os.environ.get("RINGFENCE_FUZZ_CASES", DEFAULT_CASES)
    compare = [
        "cargo",
        "run",
        "--locked",
        "--release",
        "-p",
        "ringfence-fuzz-differential",
        "--",
        "--cases",
        cases,
    ]
    return subprocess.run(compare, cwd=REPOSITORY, check=False).returncode or failed


if __name__ == "__main__":
    sys.exit(main())

"""Fuzzes every surface for a bounded time: many seeds of each body that the suite runs with few.

``RINGFENCE_FUZZ_RUNS`` says how many (the default takes minutes). Coverage-guided fuzzing is in fuzz/README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_RUNS = "20000"


def main() -> int:
    """Runs the bodies."""
    environment = {**os.environ}
    environment.setdefault("RINGFENCE_FUZZ_RUNS", DEFAULT_RUNS)
    bodies = ["cargo", "test", "--locked", "--release", "-p", "ringfence-fuzz-harness"]
    return subprocess.run(bodies, cwd=REPOSITORY, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

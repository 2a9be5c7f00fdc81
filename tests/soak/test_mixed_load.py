"""A guest that works for long gives what the host gives, and its kernel has nothing to complain about."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringfence import Machine

LOAD = Path(__file__).with_name("mixed_load.py")
ROUNDS = 10
SECONDS = float(os.environ.get("RINGFENCE_SOAK_S", "600"))
COMPLAINTS = (
    "WARNING: CPU",
    "BUG:",
    "Oops",
    "general protection",
    "segfault",
    "rcu: INFO",
    "soft lockup",
    "Call Trace",
)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_mixed_load_gives_what_the_host_gives(vcpus: int) -> None:
    command = ["/usr/bin/python3", "-W", "ignore", "mixed_load.py", str(ROUNDS)]
    expected = subprocess.run(command, cwd=LOAD.parent, capture_output=True, text=True, check=True)
    deadline = time.monotonic() + SECONDS
    mounts = [f"{LOAD.parent}:/load:ro"]
    with Machine(engine="bt", vcpus=vcpus, memory="1G", mounts=mounts, workdir="/load") as machine:
        done = 0
        while time.monotonic() < deadline or done == 0:
            result = machine.run(command)
            assert result.exit_code == 0, result.stderr[-3000:]
            assert result.stdout == expected.stdout
            done += 1
        log = machine.run(["dmesg"], check=True).stdout
        sys.stderr.write(f"{vcpus} vCPUs: {done * ROUNDS} rounds\n")
    complaints = [line for line in log.splitlines() if any(word in line for word in COMPLAINTS)]
    assert complaints == []

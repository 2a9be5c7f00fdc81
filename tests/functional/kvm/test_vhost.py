"""vhost-net: the host's kernel moves a machine's frames, where it has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.framework.rust_tests import built_tests

if TYPE_CHECKING:
    from tests.framework.nested_host import NestedHost

REPOSITORY = Path(__file__).resolve().parents[3]

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


def test_the_kernel_serves_rings_and_tells_of_broken_ones(nested_host: NestedHost) -> None:
    tests = built_tests("ringfence-netstack", "ringfence_netstack")
    done = nested_host.run([tests, "--nocapture"])
    output = done.stdout.decode() + done.stderr.decode()
    assert done.status == 0, output
    assert "not run" not in output
    assert "a_frame_is_sent_by_the_kernel" in output


def test_machines_have_their_frames_moved_by_the_kernel(nested_host: NestedHost) -> None:
    site = next(path for path in sys.path if path.endswith("site-packages"))
    environment = [f"PYTHONPATH={REPOSITORY / 'src'}:{REPOSITORY}:{site}"]
    environment += [
        f"{name}={os.environ[name]}" for name in ("RINGFENCE_BIN_DIR",) if name in os.environ
    ]
    python = os.path.realpath(sys.executable)
    done = nested_host.run(
        ["/usr/bin/env", *environment, python, "-m", "tests.functional.kvm.vhost_checks"],
        cwd=REPOSITORY,
        timeout_s=900,
    )
    output = done.stdout.decode() + done.stderr.decode()
    assert done.status == 0, output[-6000:]
    assert "11 passed, 0 failed" in output

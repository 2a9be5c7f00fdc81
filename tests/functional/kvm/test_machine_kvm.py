"""The machine's tests on the engine ``kvm``, in a host that has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.framework.nested_host import NestedHost

REPOSITORY = Path(__file__).resolve().parents[3]

# The emulated processor takes its time: what differs between engines, and the product's promises.
CHOSEN = (
    "its_own or exit_codes or streams or pausing or mounts or disk_as_the_root or host_reads"
    " or killed or panics or resets"
)

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


def test_machines_by_kvm(nested_host: NestedHost) -> None:
    functional = REPOSITORY / "tests/functional"
    tests = (functional / "test_machine.py", functional / "test_disks.py")
    command = [os.path.realpath(sys.executable), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    site = next(path for path in sys.path if path.endswith("site-packages"))
    path = f"PYTHONPATH={REPOSITORY / 'src'}:{REPOSITORY}:{site}"
    done = nested_host.run(
        ["/usr/bin/env", path, *command, "--engine", "kvm", "-k", CHOSEN, *tests],
        cwd=REPOSITORY,
        timeout_s=900,
    )
    output = done.stdout.decode(errors="replace")
    assert done.status == 0, output[-6000:]
    assert " passed" in output

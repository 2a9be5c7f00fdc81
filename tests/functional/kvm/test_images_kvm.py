"""The images' tests on the engine ``kvm``, in a host that has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.framework.nested_host import NestedHost

REPOSITORY = Path(__file__).resolve().parents[3]

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


def test_an_image_is_built_and_run_by_kvm(nested_host: NestedHost) -> None:
    if not (REPOSITORY / ".cache/images/bookworm.tar").exists():
        pytest.skip(
            "the Debian image is not cached: tests/functional/image/test_machine.py does it"
        )
    tests = REPOSITORY / "tests/functional/image/test_machine.py"
    command = [os.path.realpath(sys.executable), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    site = next(path for path in sys.path if path.endswith("site-packages"))
    environment = [f"PYTHONPATH={REPOSITORY / 'src'}:{REPOSITORY}:{site}"]
    if "RINGFENCE_BIN_DIR" in os.environ:
        environment.append(f"RINGFENCE_BIN_DIR={os.environ['RINGFENCE_BIN_DIR']}")
    done = nested_host.run(
        ["/usr/bin/env", *environment, *command, "--engine", "kvm", "-k", "same_script", tests],
        cwd=REPOSITORY,
        timeout_s=900,
    )
    output = done.stdout.decode(errors="replace")
    assert done.status == 0, output[-6000:]
    assert "1 passed" in output

"""The wheel: installed with pip alone on a host without Rust, it runs machines on a real KVM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.guest import kernels

if TYPE_CHECKING:
    from tests.framework.nested_host import NestedHost

REPOSITORY = Path(__file__).resolve().parents[3]
CHECKS = Path(__file__).with_name("machine_checks.py")
# In the nested host /tmp is its own.
ENVIRONMENT = Path("/tmp/wheel")

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheels() -> Path:
    """A directory with the wheel and all that it needs: the nested host has no network."""
    built = sorted(
        (REPOSITORY / "dist").glob("ringfence-*.whl"), key=lambda path: path.stat().st_mtime
    )
    assert built, "there is no wheel: run `make wheel`"
    folder = REPOSITORY / ".cache" / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    subprocess.run([*pip, "--find-links", str(folder), str(built[-1])], check=True)
    return folder


def run(host: NestedHost, *argv: str | Path, timeout_s: float = 300.0) -> str:
    """A command's output in the nested host, which has neither cargo nor this checkout's package."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": os.environ.get("HOME", "/root")}
    done = host.run(argv, env=environment, cwd=Path("/"), timeout_s=timeout_s)
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert done.status == 0, output
    return output


def test_the_wheel_runs_machines_on_a_host_without_rust(
    nested_host: NestedHost, wheels: Path
) -> None:
    kernel = kernels.find()
    python = os.path.realpath(sys.executable)
    run(nested_host, python, "-m", "venv", "--without-pip", ENVIRONMENT)
    # This Python's pip, so that the nested host need not unpack one.
    pip = [sys.executable, "-m", "pip", "--python", str(ENVIRONMENT / "bin" / "python")]
    pip += ["install", "--quiet", "--no-index", "--find-links", str(wheels), "ringfence"]
    run(nested_host, *pip)
    output = run(
        nested_host, ENVIRONMENT / "bin" / "python", "-I", CHECKS, kernel.version, timeout_s=600
    )
    assert "6 passed, 0 failed" in output

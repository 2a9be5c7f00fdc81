"""The conformance suite and the Python door, on a KVM that works."""

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

pytestmark = pytest.mark.kvm


def in_repository(*argv: str | Path) -> list[str | Path]:
    """A command with this Python, that imports from this repository."""
    path = f"PYTHONPATH={REPOSITORY / 'src'}:{REPOSITORY}"
    return ["/usr/bin/env", path, os.path.realpath(sys.executable), *argv]


def test_the_nested_host_has_a_usable_kvm(nested_host: NestedHost) -> None:
    script = "from ringfence._native.host import probe_kvm; print(probe_kvm().verdict)"
    done = nested_host.run(in_repository("-c", script))
    assert done.stdout == b"usable\n", done


def test_the_engine_conforms(nested_host: NestedHost) -> None:
    features = ("--features", "kvm-tests", "--test", "conformance")
    suite = built_tests("ringfence-engine-kvm", "conformance", *features)
    done = nested_host.run([suite, "--test-threads=2"], timeout_s=900)
    output = done.stdout.decode()
    assert done.status == 0, output
    assert "test result: ok." in output
    assert " 0 passed" not in output


def test_the_python_door_opens(nested_host: NestedHost) -> None:
    done = nested_host.run(in_repository("-m", "tests.native.lowlevel_checks"), cwd=REPOSITORY)
    assert done.status == 0, done.stdout.decode() + done.stderr.decode()
    assert b" passed, 0 failed" in done.stdout


def test_the_example_runs(nested_host: NestedHost) -> None:
    done = nested_host.run(in_repository(REPOSITORY / "examples" / "handwritten_guest.py"))
    assert done.stdout.startswith(b"hello from ring 0\nthe guest stopped at 0x100c\n"), done


def test_a_command_that_hangs_is_killed_and_said(nested_host: NestedHost) -> None:
    done = nested_host.run(["/bin/sleep", "60"], timeout_s=1.0)
    assert done.timed_out
    assert done.status == -9


def test_what_is_written_inside_stays_inside(nested_host: NestedHost) -> None:
    place = Path("/etc/ringfence-nested-test")
    done = nested_host.run(["/bin/sh", "-c", f"echo inside > {place} && cat {place}"])
    assert done.stdout == b"inside\n"
    assert not place.exists()

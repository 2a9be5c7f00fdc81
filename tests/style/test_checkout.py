"""What a checkout may not carry: a link made for one machine broke every other one's caches."""

from __future__ import annotations

import subprocess

from tests.style.repository import REPOSITORY


def listed(*arguments: str) -> list[str]:
    """What `git ls-files` answers to these arguments."""
    command = ["git", "ls-files", *arguments]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def test_no_symbolic_link_is_tracked() -> None:
    assert [line for line in listed("--stage") if line.startswith("120000")] == []


def test_nothing_that_is_ignored_is_tracked() -> None:
    assert listed("--cached", "--ignored", "--exclude-standard") == []

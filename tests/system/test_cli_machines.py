"""Machines in the background, and the verbs that work on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.system.test_cli_run import env, ringfence, vm_processes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["env"]

SCRIPT = "i=0; while sleep 0.1; do i=$((i+1)); echo line $i; echo err $i >&2; done"


@pytest.fixture
def name(env: dict[str, str]) -> Iterator[str]:
    """A machine in the background that writes lines."""
    done = ringfence(env, "run", "-d", "--name", "busy", "--", "sh", "-c", SCRIPT)
    assert (done.stdout, done.stderr, done.returncode) == (b"busy\n", b"", 0)
    yield "busy"
    ringfence(env, "rm", "-f", "busy")
    assert vm_processes(env) == []


def records(env: dict[str, str]) -> list[dict[str, object]]:
    """What ``ps`` says of all machines."""
    found = json.loads(ringfence(env, "ps", "-a", "--format", "json").stdout)
    assert isinstance(found, list)
    return found


def test_its_life(env: dict[str, str], name: str, tmp_path: Path) -> None:
    (record,) = records(env)
    assert (record["name"], record["status"]) == (name, "running")
    done = ringfence(env, "exec", name, "sh", "-c", "cat; exit 5", stdin=b"through")
    assert (done.stdout, done.returncode) == (b"through", 5)
    (tmp_path / "f").write_text("copied")
    assert ringfence(env, "cp", str(tmp_path / "f"), f"{name}:/tmp/f").returncode == 0
    assert ringfence(env, "exec", name, "cat", "/tmp/f").stdout == b"copied"
    assert ringfence(env, "cp", f"{name}:/tmp/f", str(tmp_path / "g")).returncode == 0
    assert (tmp_path / "g").read_text() == "copied"
    (stats,) = json.loads(ringfence(env, "stats", "--format", "json").stdout)
    assert stats["guest"]["processes"] > 1
    (counters,) = json.loads(ringfence(env, "stats", "--engine-counters", name).stdout)
    assert counters["host"]["engine"]
    (inspected,) = json.loads(ringfence(env, "inspect", name).stdout)
    assert inspected["vm"]["jail"]["landlock"] == "on"
    assert ringfence(env, "pause", name).returncode == 0
    assert records(env)[0]["status"] == "paused"
    assert b"is paused" in ringfence(env, "exec", name, "true").stderr
    assert ringfence(env, "resume", name).returncode == 0
    assert ringfence(env, "exec", name, "true").returncode == 0
    assert b"is running" in ringfence(env, "rm", name).stderr
    assert ringfence(env, "stop", name).returncode == 0
    logs = ringfence(env, "logs", name)
    assert logs.stdout.startswith(b"line 1\nline 2\n")
    assert logs.stderr.startswith(b"err 1\nerr 2\n")
    assert records(env)[0]["status"] == "exited"
    assert ringfence(env, "exec", name, "true").returncode == 125
    assert ringfence(env, "rm", name).returncode == 0
    assert records(env) == []


def test_a_name_is_taken(env: dict[str, str], name: str) -> None:
    again = ringfence(env, "run", "-d", "--name", name, "true")
    assert again.returncode == 125
    assert f"ringfence rm -f {name}".encode() in again.stderr


@pytest.mark.parametrize("victim", ["pid", "vm_pid"])
def test_ps_heals_what_was_killed(env: dict[str, str], name: str, victim: str) -> None:
    pid = records(env)[0][victim]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (status := records(env)[0]["status"]) != "exited" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status == "exited"
    assert ringfence(env, "rm", name).returncode == 0


def test_an_exit_status_is_kept(env: dict[str, str]) -> None:
    assert ringfence(env, "run", "-d", "--name", "short", "sh", "-c", "exit 3").returncode == 0
    deadline = time.monotonic() + 30
    while (record := records(env)[0])["status"] != "exited" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert record["exit_code"] == 3
    ringfence(env, "rm", "short")


def test_a_failed_start_in_the_background_is_said(env: dict[str, str]) -> None:
    done = ringfence(env, "run", "-d", "--root", "/no/such", "true")
    assert done.returncode == 125
    assert b"/no/such does not exist" in done.stderr
    assert records(env) == []


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--help"], ["help", "exec"]])
def test_help_is_there(env: dict[str, str], words: list[str]) -> None:
    done = ringfence(env, *words)
    assert done.returncode == 0
    assert b"usage: ringfence" in done.stdout


def test_mistaken_verbs_are_guessed(env: dict[str, str]) -> None:
    done = ringfence(env, "runn")
    assert done.returncode == 2
    assert b"did you mean: ringfence run" in done.stderr


def test_the_doctor_says_what_auto_takes(env: dict[str, str]) -> None:
    found = json.loads(ringfence(env, "doctor", "--format", "json").stdout)
    subjects = {finding["subject"]: finding for finding in found["findings"]}
    assert {"engine kvm", "engine bt", "engine container", "kernel"} <= set(subjects)
    assert subjects["engine bt"]["level"] == "ok"
    assert found["auto"]["engine"] in ("kvm", "bt")
    for finding in found["findings"]:
        assert finding["level"] == "ok" or finding["remedy"] or finding["summary"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_are_valid(env: dict[str, str], shell: str, tmp_path: Path) -> None:
    script = ringfence(env, "completion", shell).stdout
    assert b"_ringfence" in script
    if shell == "bash":
        path = tmp_path / "script"
        path.write_bytes(script)
        subprocess.run(["bash", "-n", path], check=True)

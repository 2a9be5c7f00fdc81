"""The suite of machines with the engine ``container``: the bodies that virtual machines pass.

What asks for a kernel of one's own is left out, and is refused where it's asked for: the last tests.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ringfence import Machine
from ringfence.errors import CommandError, UnsupportedError
from tests.functional.test_machine import (
    test_a_command_over_its_time_is_killed_with_its_children,
    test_a_directory_as_a_writable_root,
    test_a_directory_as_the_root,
    test_a_guest_that_turns_itself_off_ends_the_machine,
    test_a_killed_vm_process_is_noticed_and_leaves_nothing,
    test_a_machines_time_is_up,
    test_a_sandbox_runs_code_without_a_network,
    test_a_terminal,
    test_exit_codes_are_a_shells,
    test_files_go_in_and_out,
    test_many_commands_at_once,
    test_mounts_and_the_working_directory,
    test_pausing_holds_it_and_resuming_lets_it_go_on,
    test_streams_stay_apart_and_whole,
    test_the_environment_is_what_was_said,
    test_users_and_directories,
)
from tests.system.test_cli_run import env, ringfence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.machine.options import MachineOptions
    from ringfence.machine.spec import EngineName

__all__ = [
    "env",
    "test_a_command_over_its_time_is_killed_with_its_children",
    "test_a_directory_as_a_writable_root",
    "test_a_directory_as_the_root",
    "test_a_guest_that_turns_itself_off_ends_the_machine",
    "test_a_killed_vm_process_is_noticed_and_leaves_nothing",
    "test_a_machines_time_is_up",
    "test_a_sandbox_runs_code_without_a_network",
    "test_a_terminal",
    "test_exit_codes_are_a_shells",
    "test_files_go_in_and_out",
    "test_many_commands_at_once",
    "test_mounts_and_the_working_directory",
    "test_pausing_holds_it_and_resuming_lets_it_go_on",
    "test_streams_stay_apart_and_whole",
    "test_the_environment_is_what_was_said",
    "test_users_and_directories",
]


@pytest.fixture(scope="session")
def engine() -> EngineName:
    return "container"


@pytest.fixture(scope="module")
def machine(session_state: Path) -> Iterator[Machine]:
    assert session_state.exists()
    with Machine(engine="container", vcpus=2) as running:
        yield running


def test_its_figures_are_its_own_and_not_the_hosts(machine: Machine) -> None:
    stats = machine.guest_stats()

    assert stats.cpus == 2
    assert stats.memory_total_bytes == 512 << 20
    assert 0 < stats.memory_available_bytes < 512 << 20


def test_a_kernel_cannot_be_harmed_through_it(machine: Machine) -> None:
    for letter in "cb":
        with pytest.raises(CommandError):
            machine.run(["sh", "-c", f"echo {letter} > /proc/sysrq-trigger"], check=True)


@pytest.mark.parametrize("option", ["kernel", "disk"])
def test_what_only_a_kernel_of_ones_own_can_is_refused(option: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    options: dict[str, MachineOptions] = {
        "kernel": {"kernel": "6.1"},
        "disk": {"disk": tmp_path / "image", "disk_format": "raw"},
    }
    machine = Machine(**(options[option] | {"engine": "container"}))

    with pytest.raises(UnsupportedError):
        machine.start()


def test_each_verb_works_on_it_as_on_a_virtual_machine(env: dict[str, str], tmp_path: Path) -> None:
    script = "echo out; echo err >&2; sleep 1000"
    options = ("--engine", "container", "--network", "none", "-d", "--name", "box")
    started = ringfence(env, "run", *options, "--", "sh", "-c", script)
    (tmp_path / "file").write_text("copied")

    def ask(*words: str) -> dict[str, object]:
        (found,) = json.loads(ringfence(env, *words).stdout)
        assert isinstance(found, dict)
        return found

    executed = ringfence(env, "exec", "box", "sh", "-c", "cat; exit 5", stdin=b"through")
    copied_in = ringfence(env, "cp", str(tmp_path / "file"), "box:/tmp/file")
    copied_out = ringfence(env, "cp", "box:/tmp/file", str(tmp_path / "back"))
    stats = ask("stats", "--format", "json")
    inspected = ask("inspect", "box")
    paused = [ringfence(env, "pause", "box").returncode, ask("ps", "--format", "json")["status"]]
    refused = ringfence(env, "exec", "box", "true").stderr
    resumed = [ringfence(env, "resume", "box").returncode, ask("ps", "--format", "json")["status"]]
    logs = ringfence(env, "logs", "box")
    running = ringfence(env, "rm", "box").stderr
    stopped = ringfence(env, "stop", "box").returncode
    ended = ask("ps", "-a", "--format", "json")["status"]
    removed = ringfence(env, "rm", "box").returncode
    again = ringfence(env, "run", *options, "--", "sleep", "1000").returncode
    killed = ringfence(env, "kill", "box").returncode
    ringfence(env, "rm", "-f", "box")

    assert (started.stdout, started.returncode) == (b"box\n", 0)
    assert (executed.stdout, executed.returncode) == (b"through", 5)
    assert (copied_in.returncode, copied_out.returncode) == (0, 0)
    assert (tmp_path / "back").read_text() == "copied"
    assert isinstance(stats["guest"], dict)
    assert stats["guest"]["processes"] > 1
    assert inspected["engine"] == "container"
    assert (paused, resumed) == ([0, "paused"], [0, "running"])
    assert b"is paused" in refused
    assert (logs.stdout, logs.stderr) == (b"out\n", b"err\n")
    assert b"is running" in running
    assert (stopped, ended, removed) == (0, "exited", 0)
    assert (again, killed) == (0, 0)
    assert ringfence(env, "ps", "-a", "-q").stdout == b""

"""What a user holds: starting, commands, limits, and that nothing is left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import (
    CommandError,
    ConfigError,
    ConflictError,
    GuestCrash,
    GuestTimeout,
    HostError,
    StateError,
)
from ringfence.machine import state
from ringfence.machine.attached import AttachedMachine
from ringfence.machine.driver import Ending
from ringfence.machine.machine import Machine
from ringfence.machine.sandbox import Sandbox
from ringfence.machine.spec import MachineSpec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.framework.fake_driver import FakeDriver


def left_behind(home: Path) -> list[str]:
    """Everything of machines that is still there."""
    places = (home / "state" / "machines", home / "run")
    return [str(path) for place in places for path in place.glob("[!.]*")]


@pytest.mark.usefixtures("driver")
def test_a_command_runs_and_nothing_is_left(home: Path) -> None:
    with Machine(engine="bt") as machine:
        result = machine.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
    assert result.timing["run"] > 0
    assert left_behind(home) == []


@pytest.mark.usefixtures("driver")
def test_input_is_given_as_text_or_bytes() -> None:
    with Machine(engine="bt") as machine:
        assert machine.run(["cat"], input="grüße").stdout == "grüße"
        assert machine.run(["cat"], input=b"\xff\0").stdout_bytes == b"\xff\0"


@pytest.mark.usefixtures("driver")
def test_check_raises_with_what_was_written() -> None:
    with (
        Machine(engine="bt") as machine,
        pytest.raises(CommandError, match="status 4: no luck") as e,
    ):
        machine.run(["sh", "-c", "echo so far; echo no luck >&2; exit 4"], check=True)
    assert e.value.exit_code == 4
    assert e.value.stdout == b"so far\n"


def test_commands_get_the_machines_environment_and_their_own(driver: FakeDriver) -> None:
    with Machine(engine="bt", env={"A": "1", "B": "1"}, workdir="/w", user="7") as machine:
        machine.run(["true"], env={"B": "2"})
        machine.run(["true"], workdir="/x", user="8")
    first, second = driver.started[0].agent.commands
    assert dict(first.env) == {"A": "1", "B": "2"}
    assert (first.cwd, first.user) == ("/w", "7")
    assert (second.cwd, second.user) == ("/x", "8")


def test_the_working_directory_is_made(driver: FakeDriver) -> None:
    with Machine(engine="bt", workdir="/a/b"):
        assert (driver.started[0].agent.files.top / "a/b").is_dir()


@pytest.mark.usefixtures("driver")
def test_a_text_is_no_command() -> None:
    with Machine(engine="bt") as machine, pytest.raises(ConfigError, match="list of words") as e:
        machine.run("echo hello")
    assert '["sh", "-c"' in e.value.hint


@pytest.mark.usefixtures("driver")
def test_a_command_over_its_time_is_said_to_be() -> None:
    with Machine(engine="bt") as machine, pytest.raises(GuestTimeout, match=r"longer than 0\.05 s"):
        machine.run(["sleep", "5"], timeout_s=0.05)


@pytest.mark.usefixtures("driver")
def test_a_machine_over_its_time_ends_with_the_reason() -> None:
    with Machine(engine="bt", timeout_s=0.05) as machine:
        time.sleep(0.15)
        with pytest.raises(GuestTimeout, match=r"its time of 0\.05 s was up"):
            machine.run(["true"])


@pytest.mark.usefixtures("driver")
def test_an_idle_machine_ends_and_a_busy_one_does_not() -> None:
    with Machine(engine="bt", idle_timeout_s=0.1) as machine:
        assert machine.run(["sleep", "0.2"]).exit_code == 0
        time.sleep(0.2)
        with pytest.raises(GuestTimeout, match=r"idle for 0\.1 s"):
            machine.run(["true"])


def test_a_machine_that_crashed_says_so(driver: FakeDriver) -> None:
    with Machine(engine="bt", name="frail") as machine:
        driver.started[0].kill()
        with pytest.raises(GuestCrash, match="frail ended: it was killed"):
            machine.popen(["true"])


@pytest.mark.usefixtures("driver")
def test_use_outside_of_its_life_is_refused() -> None:
    machine = Machine(engine="bt")
    with pytest.raises(StateError, match="was not started"):
        machine.run(["true"])
    with machine, pytest.raises(StateError, match="started once"):
        machine.start()
    with pytest.raises(StateError, match="closed"):
        machine.run(["true"])
    machine.close()


def test_a_failed_start_leaves_nothing(home: Path, driver: FakeDriver) -> None:
    driver.fail = HostError("the host refused")
    with pytest.raises(HostError, match="the host refused"):
        Machine(engine="bt").start()
    assert left_behind(home) == []


@pytest.mark.usefixtures("driver")
def test_a_name_is_taken_once() -> None:
    with Machine(engine="bt", name="one"), pytest.raises(ConflictError, match="'one' already"):
        Machine(engine="bt", name="one").start()
    with Machine(engine="bt", name="one") as again:
        assert again.name == "one"


@pytest.mark.usefixtures("driver")
def test_specification_and_keywords_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="not both"):
        Machine(MachineSpec(), engine="bt")


def test_it_is_listed_and_reached_by_others(driver: FakeDriver) -> None:
    with Machine(engine="bt", name="shared", command=("sleep", "9")):
        (entry,) = state.list_machines()
        assert entry.record.status == "running"
        assert entry.record.kernel == "6.1.0-fake"
        with AttachedMachine("shared") as other:
            assert other.run(["echo", "hi"]).stdout == "hi\n"
            assert other.ask("stats", engine_counters=True)["engine"] == {"blocks": 7}
            other.pause()
            assert driver.started[0].state == "paused"
            assert state.find("shared").record.status == "paused"
            other.resume()
        assert state.find("shared").record.status == "running"


def test_a_machine_that_changes_the_host_is_powered_off_in_order(
    driver: FakeDriver, tmp_path: Path
) -> None:
    with Machine(engine="bt", mounts=[f"{tmp_path}:/x"]):
        pass
    ending = driver.started[0].ending
    assert ending is not None
    assert ending.reason == "poweroff"


def test_one_that_ended_before_all_was_written_says_so(driver: FakeDriver, tmp_path: Path) -> None:
    machine = Machine(engine="bt", mounts=[f"{tmp_path}:/x"]).start()
    driver.started[0].end(Ending(reason="failed", message="it fell", detail="its last words"))
    with pytest.raises(GuestCrash, match=r"before all was written: it fell\nits last words"):
        machine.close()
    assert driver.started[0].closed
    assert state.list_machines() == []


def test_a_crash_that_was_told_is_not_told_again(driver: FakeDriver, tmp_path: Path) -> None:
    def crash() -> None:
        driver.started[0].end(Ending(reason="failed", message="it fell"))
        message = "told"
        raise GuestCrash(message)

    with (
        pytest.raises(GuestCrash, match="told"),
        Machine(engine="bt", mounts=[f"{tmp_path}:/x"]),
    ):
        crash()


def test_one_that_does_not_is_just_killed(driver: FakeDriver, tmp_path: Path) -> None:
    with Machine(engine="bt", mounts=[f"{tmp_path}:/x:ro"]):
        pass
    ending = driver.started[0].ending
    assert ending is not None
    assert ending.reason == "killed"


@pytest.mark.usefixtures("driver")
def test_a_kept_machine_can_be_looked_at_afterwards() -> None:
    machine = Machine(engine="bt", name="kept", keep=True).start()
    machine.close(exit_code=7)
    record = state.find("kept").record
    assert (record.status, record.exit_code) == ("exited", 7)


@pytest.mark.usefixtures("driver")
def test_forgetting_to_close_warns() -> None:
    machine = Machine(engine="bt").start()
    with pytest.warns(ResourceWarning, match="was not closed"):
        machine.__del__()


@pytest.mark.usefixtures("driver")
def test_a_sandbox_runs_code() -> None:
    with Sandbox(engine="bt") as box:
        assert box.run_code("print(6 * 7)").stdout == "42\n"
        assert box.run_code('echo "$1"', language="sh", arguments=["a b"]).stdout == "a b\n"
        with pytest.raises(ConfigError, match="no way known"):
            box.run_code("", language="cobol")  # type: ignore[arg-type]
    assert box.spec.timeouts.machine_s == 3600.0
    assert box.spec.network == "none"

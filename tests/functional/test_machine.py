"""A guest with an unmodified kernel, as the Python package gives it."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import (
    ConfigError,
    FormatError,
    GuestCrash,
    GuestTimeout,
    NotFoundError,
    RingfenceError,
)
from ringfence.guest.spec import TerminalSize
from ringfence.machine import state
from ringfence.machine.machine import Machine
from ringfence.machine.process import read_some
from ringfence.machine.sandbox import Sandbox
from tests.functional.disks import make_disk

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.machine.options import MachineOptions
    from ringfence.machine.spec import EngineName

pytestmark = pytest.mark.usefixtures("session_state")


def test_the_guests_kernel_is_its_own(machine: Machine) -> None:
    version = machine.run(["uname", "-r"]).stdout.strip()
    assert version == machine.kernel
    assert machine.run(["nproc"]).stdout == "2\n"


def test_exit_codes_are_a_shells(machine: Machine) -> None:
    def code(*argv: str) -> int:
        return machine.run(argv).exit_code

    assert code("true") == 0
    assert code("sh", "-c", "exit 41") == 41
    assert code("sh", "-c", "kill -9 $$") == 137
    assert code("/no/such/program") == 127
    assert code("/etc/passwd") == 126


def test_streams_stay_apart_and_whole(machine: Machine) -> None:
    data = os.urandom(3_000_000)
    result = machine.run(["sh", "-c", "tee /dev/stderr"], input=data)
    assert hashlib.sha256(result.stdout_bytes).digest() == hashlib.sha256(data).digest()
    assert hashlib.sha256(result.stderr_bytes).digest() == hashlib.sha256(data).digest()


def test_the_environment_is_what_was_said(machine: Machine) -> None:
    output = machine.run(["env"], env={"GREETING": "grüße"}).stdout
    assert "GREETING=grüße\n" in output
    assert not {line.partition("=")[0] for line in output.splitlines()} & {
        "SSH_AUTH_SOCK",
        "RINGFENCE_HOME",
        "VIRTUAL_ENV",
    }


def test_users_and_directories(machine: Machine) -> None:
    result = machine.run(
        ["sh", "-c", "id -u; pwd; echo x > /etc/mine"], user="nobody", workdir="/usr"
    )
    assert result.stdout == "65534\n/usr\n"
    assert result.exit_code != 0


def test_a_command_over_its_time_is_killed_with_its_children(machine: Machine) -> None:
    with pytest.raises(GuestTimeout, match=r"longer than 0\.5 s"):
        machine.run(["sh", "-c", "sleep 4321 & sleep 4321"], timeout_s=0.5)
    assert machine.run(["pgrep", "-f", "sleep 4321"]).exit_code == 1


def test_a_terminal(machine: Machine) -> None:
    size = TerminalSize(columns=77, rows=11)
    with machine.popen(["sh", "-c", "tty; stty size; read x; stty size"], terminal=size) as process:
        seen = b""
        while b"11 77" not in seen:
            seen += read_some(process.stdout, 1024)
        process.resize(99, 22)
        process.stdin.write(b"\n")
        while chunk := read_some(process.stdout, 1024):
            seen += chunk
        assert process.wait() == 0
    assert b"/dev/pts/" in seen
    assert b"22 99" in seen


def test_many_commands_at_once(machine: Machine) -> None:
    processes = [machine.popen(["sh", "-c", f"sleep 0.3; echo {n}"]) for n in range(8)]
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        process.close()
    assert outputs == [b"%d\n" % n for n in range(8)]


def test_files_go_in_and_out(machine: Machine, tmp_path: Path) -> None:
    files = machine.files
    files.mkdir("/tmp/a/b", parents=True)
    files.write("/tmp/a/b/f", b"content", mode=0o600)
    assert files.read("/tmp/a/b/f") == b"content"
    assert (files.stat("/tmp/a/b/f").size, files.stat("/tmp/a/b/f").mode) == (7, 0o600)
    assert [info.name for info in files.list("/tmp/a")] == ["b"]
    files.rename("/tmp/a/b/f", "/tmp/a/g")
    files.copy_out("/tmp/a", tmp_path / "out")
    assert (tmp_path / "out/g").read_bytes() == b"content"
    files.copy_in(tmp_path / "out", "/tmp/again")
    assert files.read("/tmp/again/g") == b"content"
    files.remove("/tmp/a", recursive=True)
    with pytest.raises(RingfenceError):
        files.stat("/tmp/a")


def test_pausing_holds_it_and_resuming_lets_it_go_on(machine: Machine) -> None:
    with machine.popen(["sh", "-c", "while sleep 0.05; do echo x; done"]) as process:
        assert read_some(process.stdout, 1024)
        machine.pause()
        assert machine.inspect()["state"] == "paused"
        machine.resume()
        assert read_some(process.stdout, 1024)


def test_memory_is_given_back_and_taken_again(machine: Machine) -> None:
    def given_mib() -> int:
        balloon = machine.stats()["balloon"]
        assert isinstance(balloon, dict)
        return int(balloon["actual_bytes"]) >> 20

    machine.balloon(100)
    assert eventually(lambda: given_mib() == 100)
    machine.balloon(0)
    assert eventually(lambda: given_mib() == 0)
    with pytest.raises(ConfigError):
        machine.balloon(1 << 20)


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes to hold, in half a minute."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_what_is_said_of_it(machine: Machine) -> None:
    stats = machine.guest_stats()
    assert stats.cpus == 2
    assert 300 << 20 < stats.memory_total_bytes < 512 << 20
    assert machine.stats()["state"] == "running"
    (entry,) = [e for e in state.list_machines() if e.record.id == machine.id]
    assert entry.record.status == "running"
    assert machine.timing["kernel boot"] > 0


def test_mounts_and_the_working_directory(engine: EngineName, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/f").write_text("seen")
    (tmp_path / "one").write_text("single")
    (tmp_path / "out").mkdir()
    mounts = [f"{tmp_path}/in:/data/in:ro", f"{tmp_path}/out:/data/out", f"{tmp_path}/one:/one:ro"]
    with Machine(engine=engine, mounts=mounts, workdir="/data/out", user="1234") as machine:
        script = "cat /data/in/f /one; id -u > who; stat -c %u who; echo x > /data/in/g"
        result = machine.run(["sh", "-c", script])
        machine.run(["sync"], check=True)
    assert result.stdout == "seensingle1234\n"
    assert result.exit_code != 0
    assert (tmp_path / "out/who").read_text() == "1234\n"
    assert (tmp_path / "out/who").stat().st_uid == os.geteuid()
    assert not (tmp_path / "in/g").exists()


def test_a_directory_as_the_root(engine: EngineName, tmp_path: Path) -> None:
    make_disk(tmp_path, "raw")
    with Machine(engine=engine, root=tmp_path / "tree") as machine:
        assert machine.run(["/bin/busybox", "cat", "/hello"]).stdout == "on disk\n"
        machine.files.write("/written", b"in memory")
    assert not (tmp_path / "tree/written").exists()


def test_a_directory_as_a_writable_root(engine: EngineName, tmp_path: Path) -> None:
    make_disk(tmp_path, "raw")
    with Machine(engine=engine, root=tmp_path / "tree", writable=True) as machine:
        machine.run(["/bin/busybox", "cp", "/hello", "/copy"], check=True)
        machine.files.write("/written", b"for good")
    assert (tmp_path / "tree/copy").read_text() == "on disk\n"
    assert (tmp_path / "tree/written").read_bytes() == b"for good"


def test_a_sandbox_runs_code_without_a_network(engine: EngineName) -> None:
    with Sandbox(engine=engine) as box:
        assert box.run_code("print(6 * 7)").stdout == "42\n"
        links = box.run(["sh", "-c", "ls /sys/class/net"]).stdout.split()
    assert links == ["lo"]


def test_a_killed_vm_process_is_noticed_and_leaves_nothing(engine: EngineName) -> None:
    with Machine(engine=engine) as machine:
        record = machine.entry.record
        with machine.popen(["sleep", "100"]) as process:
            os.kill(record.vm_pid, signal.SIGKILL)
            with pytest.raises(GuestCrash, match="ended"):
                process.wait(30)
        with pytest.raises(RingfenceError):
            machine.run(["true"])
    assert record.id not in [entry.record.id for entry in state.list_machines()]


@pytest.mark.parametrize("direct", [True, False])
def test_hot_user_code_runs_directly_unless_it_must_not(
    direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_BT_DIRECT", "1" if direct else "0")
    with Machine(engine="bt") as machine:
        loop = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo $i"
        assert machine.run(["sh", "-c", loop]).stdout == "300000\n"
        counters = machine.stats(engine_counters=True)["engine"]
        assert isinstance(counters, dict)
        assert (counters["direct_visits"] > 0) == direct


def descendants(pid: int) -> list[int]:
    """The processes below one that still run."""
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def test_the_processes_of_direct_execution_end_with_the_vm_process() -> None:
    with Machine(engine="bt") as machine:
        loop = ["sh", "-c", "while :; do :; done"]
        with machine.popen(loop) as process:
            # The VM process within its namespaces, what makes spaces, and one space's two.
            assert eventually(lambda: len(descendants(machine.entry.record.vm_pid)) >= 4)
            below = descendants(machine.entry.record.vm_pid)
            os.kill(machine.entry.record.vm_pid, signal.SIGKILL)
            with pytest.raises(GuestCrash, match="ended"):
                process.wait(30)
        assert eventually(lambda: not any(is_running(pid) for pid in below))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kernel_that_panics_is_said_to(engine: EngineName) -> None:
    with Machine(engine=engine) as machine, pytest.raises(GuestCrash, match="panicked"):
        machine.run(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 20"])


def test_a_guest_that_turns_itself_off_ends_the_machine(engine: EngineName) -> None:
    with Machine(engine=engine) as machine:
        machine.stop()
        ending = machine.wait(10)
        assert ending is not None
        assert ending.reason == "poweroff"


def test_a_guest_that_resets_itself_ends_the_machine(engine: EngineName) -> None:
    with Machine(engine=engine) as machine, machine.popen(["sleep", "60"]):
        # At once, as firmware's button does: the agent isn't asked.
        with pytest.raises(GuestCrash, match="reset itself"):
            machine.run(["sh", "-c", "echo b > /proc/sysrq-trigger; sleep 60"])
        ending = machine.wait(10)
    assert ending is not None
    assert ending.reason == "reboot"


def test_a_machines_time_is_up(engine: EngineName) -> None:
    with Machine(engine=engine, timeout_s=1.0) as machine:
        begin = time.monotonic()
        with pytest.raises(GuestTimeout, match="its time of 1 s was up"):
            machine.run(["sleep", "60"])
        assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kernel": "/etc/passwd"}, RingfenceError, "passwd"),
        ({"kernel": "9.9.9-none"}, NotFoundError, "9.9.9-none"),
        ({"mounts": ["/no/such/place:/x"]}, NotFoundError, "/no/such/place"),
        ({"root": "/no/such/place"}, NotFoundError, "/no/such/place"),
        ({"root": "/etc/passwd"}, ConfigError, "not a directory"),
        ({"memory": "99T"}, ConfigError, "this host has"),
        ({"network": "warp"}, RingfenceError, "warp"),
        ({"disk": "/etc/passwd", "disk_format": "qcow2"}, FormatError, "not a qcow2"),
    ],
)
def test_bad_input_starts_nothing_and_leaves_nothing(
    engine: EngineName,
    session_state: Path,
    options: MachineOptions,
    error: type[RingfenceError],
    words: str,
) -> None:
    before = sorted(session_state.rglob("*"))
    with pytest.raises(error, match=words):
        Machine(**(options | {"engine": engine})).start()
    assert sorted(session_state.rglob("*")) == before

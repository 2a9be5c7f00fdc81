from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import (
    AgentError,
    GuestTimeout,
    StateError,
)
from ringfence.guest.agent import Agent, connect_vsock
from ringfence.guest.spec import ExecSpec, GuestSetup, RootSpec, TerminalSize

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.guest.conftest import Hosted


def sh(script: str, *, stdin: bool = True) -> ExecSpec:
    return ExecSpec(argv=("/bin/sh", "-c", script), stdin=stdin)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)
    pytest.fail(f"process {pid} still runs")


def test_it_greeted_and_was_set_up_once(hosted: Hosted) -> None:
    assert hosted.agent.kernel == os.uname().release
    hosted.agent.ping()


def test_output_errors_and_status_come_apart(hosted: Hosted) -> None:
    done = hosted.run(sh("echo out; echo err >&2; exit 7"))
    assert done == (7, b"out\n", b"err\n")


def test_stdin_comes_back_whole(hosted: Hosted) -> None:
    data = os.urandom(5 << 20)
    assert hosted.run(ExecSpec(argv=("cat",)), data) == (0, data, b"")


def test_a_hundred_megabytes_come_through_stdout(hosted: Hosted) -> None:
    spec = ExecSpec(argv=("head", "-c", "100000000", "/dev/zero"))
    code, output, _ = hosted.run(spec)
    assert code == 0
    assert len(output) == 100_000_000
    assert output.count(b"\0") == len(output)


def test_a_stream_that_nobody_reads_holds_up_nothing_else(hosted: Hosted) -> None:
    script = "head -c 10000000 /dev/zero >&2 & echo first; read x; echo got $x; wait"
    with hosted.agent.exec(sh(script)) as process:
        assert process.stdout.readline() == b"first\n"
        # Standard error is far over its window by now.
        process.stdin.write(b"word\n")
        assert process.stdout.readline() == b"got word\n"
        assert process.poll() is None
        assert len(process.stderr.read()) == 10_000_000
        assert process.wait(10) == 0


def test_input_that_the_command_does_not_read_holds_up_no_signal(hosted: Hosted) -> None:
    with hosted.agent.exec(sh("exec sleep 100")) as process:
        writer = threading.Thread(target=write_ignoring_the_end, args=(process.stdin,))
        writer.start()
        time.sleep(0.1)
        process.signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        writer.join(10)
        assert not writer.is_alive()


def write_ignoring_the_end(stream: object) -> None:
    write = getattr(stream, "write")  # noqa: B009 - the type isn't told to the thread
    with contextlib.suppress(BrokenPipeError, AgentError):
        write(bytes(4 << 20))


def test_a_command_without_input_reads_the_end(hosted: Hosted) -> None:
    assert hosted.run(ExecSpec(argv=("cat",), stdin=False)) == (0, b"", b"")


def test_closing_stdin_ends_the_commands_input(hosted: Hosted) -> None:
    with hosted.agent.exec(ExecSpec(argv=("wc", "-c"))) as process:
        process.stdin.write(b"abc")
        process.stdin.close()
        assert process.stdout.read() == b"3\n"
        assert process.wait(10) == 0


def test_many_commands_run_at_once(hosted: Hosted) -> None:
    processes = [hosted.agent.exec(sh(f"read x; echo {n} $x")) for n in range(40)]
    for number, process in enumerate(processes):
        process.stdin.write(b"%d\n" % number)
    for number, process in enumerate(processes):
        with process:
            assert process.stdout.read() == b"%d %d\n" % (number, number)
            assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("no-such-program",), 127, "command not found"),
        (("/nowhere/program",), 127, "No such file"),
        (("/etc/passwd",), 126, "permission denied"),
        (("/etc",), 126, "is a directory"),
    ],
)
def test_commands_that_cannot_start_end_as_in_a_shell(
    hosted: Hosted, argv: tuple[str, ...], code: int, words: str
) -> None:
    with hosted.agent.exec(ExecSpec(argv=argv)) as process:
        assert process.communicate() == (b"", b"")
        assert process.wait() == code
        assert words in process.message
        assert process.pid == 0


def test_a_missing_interpreter_and_directory_are_said(hosted: Hosted, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/interpreter\n")
    script.chmod(0o755)
    with hosted.agent.exec(ExecSpec(argv=(str(script),))) as process:
        assert process.wait(10) == 127
    with hosted.agent.exec(ExecSpec(argv=("true",), cwd="/nowhere")) as process:
        assert process.wait(10) == 126
        assert "/nowhere" in process.message


def test_variables_and_directory_are_the_commands_own(hosted: Hosted, tmp_path: Path) -> None:
    spec = ExecSpec(argv=("env",), env={"A": "b c", "PATH": "/usr/bin:/bin"}, cwd=str(tmp_path))
    _, output, _ = hosted.run(spec)
    lines = output.decode().splitlines()
    assert "A=b c" in lines
    assert "PATH=/usr/bin:/bin" in lines
    assert "CARGO" not in output.decode()
    spec = ExecSpec(argv=("pwd",), cwd=str(tmp_path))
    assert hosted.run(spec)[1].decode() == f"{tmp_path}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become others")
def test_a_command_runs_as_the_user_that_is_asked(hosted: Hosted) -> None:
    script = "id -u; id -g; id -G; echo $HOME"
    for user in ("daemon", "1"):
        spec = ExecSpec(argv=("/bin/sh", "-c", script), user=user)
        assert hosted.run(spec)[1] == b"1\n1\n1\n/usr/sbin\n"
    spec = ExecSpec(argv=("/bin/sh", "-c", script), user="54321:54322")
    assert hosted.run(spec)[1] == b"54321\n54322\n54322\n/\n"


def test_an_unknown_user_is_said(hosted: Hosted) -> None:
    with hosted.agent.exec(ExecSpec(argv=("true",), user="nobody-here")) as process:
        assert process.wait(10) == 126
        assert "nobody-here" in process.message


def test_limits_of_the_setup_hold(hosted: Hosted) -> None:
    assert hosted.run(sh("ulimit -Sn; ulimit -Hn"))[1] == b"500\n600\n"


def test_a_terminal_has_a_size_and_echoes(hosted: Hosted) -> None:
    spec = ExecSpec(
        argv=("/bin/sh", "-c", "stty size; read x; echo got $x; read x; stty size"),
        terminal=TerminalSize(columns=100, rows=30),
    )
    with hosted.agent.exec(spec) as process:
        assert process.stdout.readline() == b"30 100\r\n"
        process.stdin.write(b"word\n")
        assert process.stdout.readline() == b"word\r\n"
        assert process.stdout.readline() == b"got word\r\n"
        process.resize(50, 20)
        process.stdin.write(b"\n")
        assert process.stdout.read() == b"\r\n20 50\r\n"
        assert process.wait(10) == 0


def test_ctrl_c_and_the_end_of_input_reach_a_terminals_command(hosted: Hosted) -> None:
    terminal = TerminalSize()
    with hosted.agent.exec(ExecSpec(argv=("cat",), terminal=terminal)) as process:
        process.stdin.write(b"x\n")
        assert process.stdout.readline() == b"x\r\n"
        process.stdin.write(b"\x03")
        assert process.wait(10) == 128 + signal.SIGINT
    with hosted.agent.exec(ExecSpec(argv=("cat",), terminal=terminal)) as process:
        process.stdin.close()
        assert process.wait(10) == 0


def test_all_of_a_terminals_output_comes(hosted: Hosted) -> None:
    spec = ExecSpec(argv=("seq", "20000"), terminal=TerminalSize())
    _, output, _ = hosted.run(spec)
    assert output.split() == [b"%d" % number for number in range(1, 20001)]


def test_a_signal_reaches_the_whole_group(hosted: Hosted) -> None:
    with hosted.agent.exec(sh("sleep 100 & echo $!; wait")) as process:
        child = int(process.stdout.readline())
        process.kill()
        assert process.wait(10) == 137
        wait_until_gone(child)


def test_a_command_is_killed_after_its_time_with_what_it_started(hosted: Hosted) -> None:
    script = "setsid sleep 100 & sleep 100 & echo $!; wait"
    spec = ExecSpec(argv=("/bin/sh", "-c", script), timeout_s=0.2)
    with hosted.agent.exec(spec) as process:
        child = int(process.stdout.readline())
        assert process.wait(10) == 137
        assert process.timed_out
        wait_until_gone(child)


def test_waiting_has_a_time_of_its_own(hosted: Hosted) -> None:
    with hosted.agent.exec(sh("sleep 100")) as process:
        with pytest.raises(GuestTimeout):
            process.wait(0.05)
        with pytest.raises(GuestTimeout):
            process.communicate(timeout_s=0.05)
        assert process.poll() is None
        assert process.pid > 0


def test_a_command_in_the_background_does_not_hold_up_the_end(hosted: Hosted) -> None:
    start = time.monotonic()
    code, output, _ = hosted.run(sh("setsid sleep 5 & echo done"))
    assert (code, output) == (0, b"done\n")
    assert time.monotonic() - start < 4


def test_closing_kills_the_command_and_its_children(hosted: Hosted) -> None:
    process = hosted.agent.exec(sh("sleep 100 & echo $!; wait"))
    child = int(process.stdout.readline())
    pid = process.pid
    process.close()
    wait_until_gone(pid)
    wait_until_gone(child)


def test_orphans_are_reaped(hosted: Hosted) -> None:
    _, output, _ = hosted.run(sh("setsid sleep 0.1 > /dev/null & echo $!"))
    pid = int(output)
    wait_until_gone(pid)


def test_stats_are_the_kernels(hosted: Hosted) -> None:
    stats = hosted.agent.stats()
    assert stats.cpus == os.cpu_count()
    assert stats.memory_total_bytes > stats.memory_available_bytes > 0
    assert stats.cpu_user_s > 0
    assert stats.processes > 1


def test_an_agent_that_is_not_the_first_process_turns_nothing_off(hosted: Hosted) -> None:
    with pytest.raises(StateError, match="not the guest's first process"):
        hosted.agent.power_off()
    hosted.agent.ping()


def test_a_closed_client_says_so(hosted: Hosted) -> None:
    agent = Agent.attach(hosted.connect)
    agent.close()
    agent.close()
    with pytest.raises(StateError, match="closed"):
        agent.ping()
    with pytest.raises(StateError, match="set up already"):
        Agent.attach(hosted.connect).setup(GuestSetup(root=RootSpec.virtiofs("root")))


def test_vsock_connections_shake_hands(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vsock"))
        listener.listen()

        def serve(answer: bytes) -> None:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100) == b"CONNECT 77\n"
                connection.sendall(answer)

        for answer in (b"OK 5000\nfirst", b""):
            server = threading.Thread(target=serve, args=(answer,))
            server.start()
            try:
                if answer:
                    with connect_vsock(tmp_path / "vsock", 77) as sock:
                        assert sock.recv(100) == b"first"
                else:
                    with pytest.raises(AgentError, match="nobody listens on port 77"):
                        connect_vsock(tmp_path / "vsock", 77)
            finally:
                server.join()
    with pytest.raises(AgentError, match="cannot reach port 77"):
        connect_vsock(tmp_path / "nowhere", 77)

"""The command ``ringfence run``, as a process: streams, statuses, signals, and what is left."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "ringfence")
TIMEOUT_S = 90.0


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """State and sockets of its own; the cache with its kernels is the user's."""
    folders = {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_RUNTIME_DIR": str(tmp_path)}
    # Tests change the directory, and a relative path would go with it.
    path = os.pathsep.join(str(Path(place).absolute()) for place in sys.path if place)
    return {**os.environ, **folders, "PYTHONPATH": path}


def ringfence(
    env: dict[str, str], *words: str, stdin: bytes = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs it to its end."""
    return subprocess.run(
        [*COMMAND, *words],
        env=env,
        input=stdin,
        cwd=cwd,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def start(
    request: pytest.FixtureRequest, env: dict[str, str], *words: str
) -> subprocess.Popen[bytes]:
    """Starts a command that says ``up`` first, and waits until it has."""
    process = subprocess.Popen(
        [*COMMAND, *words], env=env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    # Nothing here may hang: it ends with the test.
    request.addfinalizer(lambda: end(process))
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills it and takes note of its end."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def left_behind(env: dict[str, str]) -> list[str]:
    """Names of machines that are still known."""
    return ringfence(env, "ps", "-a", "-q").stdout.decode().split()


def vm_processes(env: dict[str, str]) -> list[int]:
    """VM processes that were started from here."""
    place = env["XDG_STATE_HOME"]
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_vm = b"ringfence-vm" in (process / "cmdline").read_bytes()
            log = str((process / "fd/2").readlink())
        except OSError:
            continue
        if is_vm and log.startswith(place):
            found.append(int(process.name))
    return found


def test_output_status_and_nothing_left(env: dict[str, str]) -> None:
    done = ringfence(env, "run", "--", "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 42)
    assert left_behind(env) == []
    assert vm_processes(env) == []


def test_100_mb_pass_whole_both_ways(env: dict[str, str]) -> None:
    data = os.urandom(1 << 20) * 100
    done = ringfence(env, "run", "cat", stdin=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert done.returncode == 0


def test_this_directory_is_seen_only_when_asked(env: dict[str, str], tmp_path: Path) -> None:
    here = tmp_path / "project"
    here.mkdir()
    (here / "main.py").write_text("import os; print(os.getcwd())")
    assert ringfence(env, "run", "ls", str(here), cwd=here).returncode != 0
    seen = ringfence(env, "run", "--here", "python3", "main.py", cwd=here)
    assert seen.stdout.decode().strip() == str(here)
    assert ringfence(env, "run", "--here", "touch", "made", cwd=here).returncode != 0
    assert ringfence(env, "run", "--here=rw", "touch", "made", cwd=here).returncode == 0
    assert (here / "made").exists()


def test_timing_shows_the_phases(env: dict[str, str]) -> None:
    done = ringfence(env, "run", "--timing", "true")
    assert done.stdout == b""
    phases = re.findall(r"^  (.+?)\s+[\d.]+ ms$", done.stderr.decode(), re.MULTILINE)
    assert {"kernel boot", "guest setup", "total", "command"} <= set(phases)


def test_a_signal_reaches_the_command(request: pytest.FixtureRequest, env: dict[str, str]) -> None:
    script = "trap 'echo got it; exit 9' TERM; echo up; while :; do sleep 0.1; done"
    process = start(request, env, "run", "--", "sh", "-c", script)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=TIMEOUT_S)[0] == b"got it\n"
    assert process.returncode == 9
    assert left_behind(env) == []


def test_three_interrupts_end_a_stubborn_one(
    request: pytest.FixtureRequest, env: dict[str, str]
) -> None:
    script = "trap '' INT; echo up; while :; do sleep 0.1; done"
    process = start(request, env, "run", "--", "sh", "-c", script)
    # Interrupts that come before the last one was noticed, on a busy host, are one.
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        if process.poll() is not None:
            break
    assert process.wait(TIMEOUT_S) == 130
    assert left_behind(env) == []
    assert vm_processes(env) == []


def test_a_killed_command_line_leaves_nothing(
    request: pytest.FixtureRequest, env: dict[str, str]
) -> None:
    process = start(request, env, "run", "--", "sh", "-c", "echo up; sleep 100")
    assert len(vm_processes(env)) > 0
    end(process)
    deadline = time.monotonic() + 10
    while vm_processes(env) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert vm_processes(env) == []
    assert left_behind(env) == []


def test_an_end_asked_for_while_it_starts(env: dict[str, str]) -> None:
    process = subprocess.Popen([*COMMAND, "run", "true"], env=env)
    time.sleep(0.4)
    process.terminate()
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM
    assert left_behind(env) == []
    assert vm_processes(env) == []


def test_nobody_reads_the_output(request: pytest.FixtureRequest, env: dict[str, str]) -> None:
    process = start(request, env, "run", "--", "sh", "-c", "echo up; exec yes")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
    assert left_behind(env) == []


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--vcpus", "0", "--", "true"], 2, "1 to 32 vCPUs"),
        (["-m", "4096G", "--", "true"], 2, "this host has"),
        (["--engine", "warp", "--", "true"], 2, "no engine 'warp'"),
        (["--no-such-option"], 2, "--no-such-option"),
        (["--network", "no-such", "--", "true"], None, "no-such"),
        (["--kernel", "/etc/passwd", "--", "true"], None, "/etc/passwd"),
        (["--root", "/no/such", "--", "true"], 125, "/no/such does not exist"),
        (["-v", "/no/such:/x", "--", "true"], 125, "/no/such does not exist"),
        (["--disk", "/etc/passwd", "--", "true"], 2, "never guessed"),
        (["--disk", "/etc/passwd", "--disk-format", "qcow2", "true"], 125, "not a qcow2"),
        (["-p", "80:80", "--network", "none", "true"], 2, "publish"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    env: dict[str, str], words: list[str], status: int | None, said: str
) -> None:
    done = ringfence(env, "run", *words)
    assert done.returncode == status if status is not None else done.returncode in (2, 125)
    assert said in done.stderr.decode()
    assert done.stdout == b""
    assert "Traceback" not in done.stderr.decode()
    assert left_behind(env) == []


def test_the_command_line_starts_in_100_ms(env: dict[str, str]) -> None:
    def processor_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ringfence(env, "ps").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Its processor time: on a busy host the rest is others'.
    assert min(processor_s() for _ in range(5)) < 0.1

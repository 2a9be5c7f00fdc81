"""Real engines with ``ringfence-oci`` as their runtime: Podman, containerd, Docker."""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.framework.engines import (
    answers,
    containerd_config,
    daemon,
    make_archive,
    make_runtime,
    need,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run container engines"),
]


class Engine(Protocol):
    """An engine's client: runs it and returns what it wrote."""

    def __call__(self, *words: str, status: int = 0) -> str: ...


_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Engines make sockets below it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="rf-eng-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Path:
    """The runtime as an installation has it: the script, with an interpreter of its own."""
    return make_runtime(folder)


@pytest.fixture(scope="module")
def archive(folder: Path) -> Path:
    return make_archive(folder)


@pytest.fixture(scope="module")
def podman(folder: Path, runtime: Path, archive: Path) -> Iterator[Engine]:
    base = [
        need("podman"), "--root", str(folder / "p/root"), "--runroot", str(folder / "p/run"),
        "--cgroup-manager", "cgroupfs", "--runtime", str(runtime),
    ]  # fmt: skip

    def call(*words: str, status: int = 0) -> str:
        return run(*base, *words, status=status)

    call("import", str(archive), "box")
    yield call
    call("rm", "--all", "--force", "--time", "0")
    call("rmi", "--all", "--force")
    subprocess.run(["umount", folder / "p/root/overlay"], capture_output=True, check=False)


@pytest.fixture(scope="module")
def containerd(folder: Path) -> Iterator[Path]:
    program = need("containerd")
    place = folder / "c"
    place.mkdir()
    config, socket = containerd_config(place)
    with daemon(
        place / "log", lambda: answers(need("ctr"), "-a", socket, "version"),
        program, "-c", config,
    ):  # fmt: skip
        yield socket


@pytest.fixture(scope="module")
def docker(folder: Path, runtime: Path, archive: Path, containerd: Path) -> Iterator[Engine]:
    program, client = need("dockerd"), need("docker")
    place = folder / "d"
    place.mkdir()
    base = [client, "-H", f"unix://{place}/d.sock"]

    def call(*words: str, status: int = 0) -> str:
        return run(*base, *words, status=status)

    with daemon(
        place / "log", lambda: answers(*base, "version"),
        program, "--data-root", place / "root", "--exec-root", place / "run",
        "-H", f"unix://{place}/d.sock", "-p", place / "pid", "--containerd", containerd,
        "--add-runtime", f"ringfence={runtime}", "--default-runtime", "ringfence",
        "--iptables=false", "--ip6tables=false", "--bridge=none",
    ):  # fmt: skip
        call("import", str(archive), "box")
        yield call


@pytest.fixture(params=["podman", "docker"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    call: Engine = request.getfixturevalue(request.param)
    yield call
    names = call("ps", "--all", "--quiet").split()
    if names:
        call("rm", "--force", *names)


def test_run_is_confined_and_gives_the_exit_status(engine: Engine) -> None:
    script = "id -u; grep Seccomp: /proc/self/status; exit 5"

    output = engine(
        "run", "--rm", *_LIMITS, "--network", "none", "box", "sh", "-c", script, status=5
    )

    assert output.split() == ["0", "Seccomp:", "2"]


def test_exec_stop_and_limits(engine: Engine) -> None:
    limits = ("--memory", "32m", "--pids-limit", "15", "--cpus", "0.5")
    engine(
        "run",
        "--detach",
        "--name",
        "one",
        *_LIMITS,
        "--network",
        "none",
        *limits,
        "box",
        "sleep",
        "100",
    )

    processes = engine("exec", "one", "ps")
    failed = engine("exec", "one", "sh", "-c", "exit 9", status=9)
    memory = engine("exec", "one", "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    engine("pause", "one")
    engine("unpause", "one")
    engine("stop", "--time", "1", "one")
    state = engine("inspect", "one", "--format", "{{.State.Status}} {{.State.ExitCode}}")

    assert "sleep 100" in processes
    assert failed == ""
    assert memory.strip() == str(32 << 20)
    assert state.split() == ["exited", "137"]


def test_docker_tells_of_too_much_memory(docker: Engine) -> None:
    limits = ("--memory", "16m", "--memory-swap", "16m")
    # containerd begins to watch for it only after the start, whatever the runtime.
    hog = ("sh", "-c", "sleep 1; dd if=/dev/zero of=/dev/null bs=100M count=1")

    docker("run", "--name", "two", *_LIMITS, "--network", "none", *limits, "box", *hog, status=137)

    end = time.monotonic() + 10
    # The end and the reason of it come by two ways.
    while docker("inspect", "two", "--format", "{{.State.OOMKilled}}").strip() != "true":
        assert time.monotonic() < end
        time.sleep(0.1)
    docker("rm", "two")


def test_a_program_that_is_missing_is_told_as_by_runc(engine: Engine) -> None:
    engine("run", "--rm", *_LIMITS, "--network", "none", "box", "nowhere", status=127)


def test_a_terminal_is_handed_to_the_engine(engine: Engine) -> None:
    output = engine("run", "--rm", "--tty", *_LIMITS, "--network", "none", "box", "tty")

    assert "/dev/pts/0" in output


def test_docker_starts_many_without_a_mistake(docker: Engine) -> None:
    for _number in range(10):
        docker("run", "--rm", *_LIMITS, "--network", "none", "box", "true")


def test_containerd_runs_execs_pauses_and_kills(
    folder: Path, runtime: Path, archive: Path, containerd: Path
) -> None:
    # Its name is the state's place on the host, which other runs must not share.
    base = [need("ctr"), "-a", str(containerd), "--namespace", folder.name]
    layout = folder / "oci"
    run(need("umoci"), "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:box")
    run("umoci", "unpack", "--image", f"{layout}:box", folder / "unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked/rootfs", filter="data")
    run("umoci", "repack", "--image", f"{layout}:box", folder / "unpacked")
    with tarfile.open(folder / "image.tar", "w") as tar:
        tar.add(layout, arcname=".")
    run(*base, "image", "import", "--index-name", "box", folder / "image.tar")
    names = run(*base, "image", "ls", "-q").split()
    name = next(word for word in names if "box" in word)
    binary = ("--runc-binary", str(runtime))

    output = run(*base, "run", "--rm", *binary, name, "a", "id", "-u")
    run(
        *base,
        "run",
        "--detach",
        *binary,
        "--memory-limit",
        str(32 << 20),
        name,
        "b",
        "sleep",
        "100",
    )
    executed = run(*base, "task", "exec", "--exec-id", "e", "b", "sh", "-c", "ps; exit 3", status=3)
    run(*base, "task", "pause", "b")
    paused = run(*base, "task", "ls")
    run(*base, "task", "resume", "b")
    metrics = run(*base, "task", "metrics", "b")
    run(*base, "task", "kill", "--signal", "SIGKILL", "b")
    end = time.monotonic() + 10
    while "STOPPED" not in run(*base, "task", "ls"):
        assert time.monotonic() < end
        time.sleep(0.1)
    run(*base, "task", "rm", "b")
    run(*base, "container", "rm", "b")

    assert output.strip() == "0"
    assert "sleep 100" in executed
    assert "PAUSED" in paused
    assert str(32 << 20) in metrics

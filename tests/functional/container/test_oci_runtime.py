"""The runtime's commands on bundles, as an engine uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.framework.bundles import Runtime, left_behind, make_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces and cgroups"),
]


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path / "states")


@pytest.fixture
def name(runtime: Runtime) -> Iterator[str]:
    name = f"rf-test-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    runtime("delete", "--force", name)
    assert left_behind(name) == []
    assert list(runtime.states.glob("*")) == []


def until(condition: object, timeout_s: float = 5) -> None:
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def test_run_gives_output_and_exit_status(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "sh", "-c", "echo $0-$$; hostname; exit 7")

    output = runtime("run", "--bundle", str(bundle), name, status=7)

    assert output == "sh-1\nringfence\n"


def test_a_created_container_waits_until_it_is_started(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", "sleep", "100")
    pid_file = tmp_path / "pid"

    runtime("create", "--bundle", str(bundle), "--pid-file", str(pid_file), name)
    before = runtime.status(name), Path(f"/proc/{pid_file.read_text()}/comm").read_text()
    runtime("start", name)
    after = runtime.status(name)
    until(lambda: Path(f"/proc/{pid_file.read_text()}/comm").read_text() == "sleep\n")
    second = runtime("start", name, status=1)

    assert before == ("created", "4\n") or before[0] == "created"
    assert after == "running"
    assert "cannot start an already running container" in second


def test_exec_joins_the_container(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "sleep", "100")
    runtime("run", "--detach", "--bundle", str(bundle), name)

    output = runtime(
        "exec", "--env", "X=1", "--cwd", "/tmp", name, "sh", "-c", "echo $X $PWD; exit 3", status=3
    )
    processes = runtime("exec", name, "ps")

    assert output == "1 /tmp\n"
    assert " 1 " in processes
    assert "sleep 100" in processes


def test_kill_pause_and_delete(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "sleep", "100")
    runtime("run", "--detach", "--bundle", str(bundle), name)

    runtime("pause", name)
    paused = runtime.status(name)
    refused = runtime("exec", name, "true", status=255)
    runtime("resume", name)
    resumed = runtime.status(name)
    running = runtime("delete", name, status=1)
    runtime("kill", name, "KILL")
    until(lambda: runtime.status(name) == "stopped")
    again = runtime("kill", name, status=1)
    runtime("delete", name)

    assert (paused, resumed) == ("paused", "running")
    assert "paused container" in refused
    assert "is not stopped" in running
    assert "container not running" in again
    assert "container does not exist" in runtime("state", name, status=1)


def test_signals_in_the_foreground_reach_the_program(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    script = "trap 'echo got; exit 5' TERM; echo up; while :; do sleep 0.05; done"
    bundle = make_bundle(tmp_path / "b", "sh", "-c", script)
    process = subprocess.Popen(
        runtime.command("run", "--bundle", str(bundle), name), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None

    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)

    assert process.communicate(timeout=10)[0] == "got\n"
    assert process.returncode == 5


def test_limits_hold_and_can_be_changed(runtime: Runtime, name: str, tmp_path: Path) -> None:
    resources = {"memory": {"limit": 32 << 20}, "pids": {"limit": 20}}
    bundle = make_bundle(tmp_path / "b", "sleep", "100", linux={"resources": resources})
    runtime("run", "--detach", "--bundle", str(bundle), name)

    runtime("update", "--memory", "64m", "--pids-limit", "12", name)
    data = json.loads(runtime("events", "--stats", name))["data"]
    hog = runtime("exec", name, "sh", "-c", "for i in $(seq 40); do sleep 5 & done; wait", status=2)

    assert data["memory"]["usage"]["limit"] == 64 << 20
    assert data["pids"]["limit"] == 12
    assert "fork" in hog


def test_memory_beyond_the_limit_ends_the_program_and_is_told(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    bundle = make_bundle(
        tmp_path / "b", "sleep", "100",
        linux={"resources": {"memory": {"limit": 16 << 20, "swap": 16 << 20}}},
    )  # fmt: skip
    runtime("run", "--detach", "--bundle", str(bundle), name)
    events = subprocess.Popen(
        runtime.command("events", "--interval", "100ms", name), stdout=subprocess.PIPE, text=True
    )
    assert events.stdout is not None
    events.stdout.readline()

    runtime("exec", name, "dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1", status=137)
    kinds = {json.loads(events.stdout.readline())["type"] for _line in range(8)}
    events.kill()
    events.communicate()

    assert "oom" in kinds


def test_hooks_run_at_their_points(runtime: Runtime, name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    kinds = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]

    def hook(kind: str) -> dict[str, object]:
        script = f"read -r state; echo {kind} $state >> {log}"
        return {"path": "/bin/sh", "args": ["sh", "-c", script]}

    bundle = make_bundle(tmp_path / "b", "true", hooks={kind: [hook(kind)] for kind in kinds})

    runtime("run", "--bundle", str(bundle), name)
    lines = log.read_text().splitlines()

    assert [line.split()[0] for line in lines] == kinds
    assert all(json.loads(line.split(" ", 1)[1])["id"] == name for line in lines)


def test_a_failing_hook_leaves_nothing(runtime: Runtime, name: str, tmp_path: Path) -> None:
    hook = {"path": "/bin/false"}
    bundle = make_bundle(tmp_path / "b", "true", hooks={"createRuntime": [hook]})

    output = runtime("run", "--bundle", str(bundle), name, status=1)

    assert "error running createRuntime hook #0: /bin/false failed" in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/nowhere"], "stat /nowhere"),
        (["nowhere"], "executable file not found in $PATH"),
        (["/tmp"], "Permission denied"),
    ],
)
def test_a_program_that_is_missing_is_told_at_create(
    runtime: Runtime, name: str, tmp_path: Path, command: list[str], message: str
) -> None:
    bundle = make_bundle(tmp_path / "b", *command)

    assert message in runtime("create", "--bundle", str(bundle), name, status=1)


def test_errors_go_to_the_log_as_engines_read_them(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    log = tmp_path / "log.json"

    runtime("--log", str(log), "--log-format", "json", "state", name, status=1)
    entry = json.loads(log.read_text())

    assert entry["level"] == "error"
    assert "container does not exist" in entry["msg"]


def test_a_user_namespace_of_its_own(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(
        tmp_path / "b", "sh", "-c", "id -u; cat /proc/self/uid_map; ls -ln /dev/null"
    )
    config = json.loads((bundle / "config.json").read_text())
    config["linux"]["namespaces"] += [{"type": "user"}, {"type": "cgroup"}, {"type": "time"}]
    config["linux"]["timeOffsets"] = {"boottime": {"secs": 1000}}
    mapping = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = mapping
    (bundle / "config.json").write_text(json.dumps(config))
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)

    output = runtime("run", "--bundle", str(bundle), name)

    assert output.splitlines()[0] == "0"
    assert output.splitlines()[1].split() == ["0", "100000", "65536"]


def test_a_hundred_containers_leave_nothing(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "true")
    descriptors = len(list(Path("/proc/self/fd").iterdir()))

    for number in range(100):
        runtime("run", "--bundle", str(bundle), f"{name}-{number}")

    assert left_behind(name) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_reaper_passes_signals_on_and_gives_the_programs_status(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    script = "(sleep 0.1 &); trap 'exit 9' TERM; echo up $$; while :; do sleep 0.02; done"
    bundle = make_bundle(
        tmp_path / "b", "sh", "-c", script, annotations={"org.ringfence.reaper": "true"}
    )
    process = subprocess.Popen(
        runtime.command("run", "--bundle", str(bundle), name), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None

    assert process.stdout.readline() == "up 2\n"
    time.sleep(0.3)
    # The program's own children are its to wait for.
    look = (
        "for p in /proc/[0-9]*/status; do grep -qs State:.Z $p && grep -ls PPid:.1$ $p; done; true"
    )
    zombies = runtime("exec", name, "sh", "-c", look)
    process.send_signal(signal.SIGTERM)

    process.communicate(timeout=10)

    assert process.returncode == 9
    assert zombies == ""


_SECOND_VERSION = """
umount --lazy /sys/fs/cgroup/* /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup || exit 99
"$@"
"""


def on_second_version(runtime: Runtime, *words: str, status: int = 0) -> str:
    """The runtime on a host that has version 2 of control groups alone: in a mount namespace."""
    command = ["unshare", "--mount", "sh", "-c", _SECOND_VERSION, "sh", *runtime.command(*words)]
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=30, check=False
        )
        output.seek(0)
        text = output.read().decode()
    assert done.returncode == status, text
    return text


def test_version_2_alone_is_served(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "sleep", "100")
    disk = Path("/").stat().st_dev
    node = f"mknod /tmp/d b {os.major(disk)} {os.minor(disk)}; head -c 1 /tmp/d"

    on_second_version(runtime, "run", "--detach", "--bundle", str(bundle), name)
    own = on_second_version(runtime, "exec", name, "cat", "/proc/self/cgroup")
    on_second_version(runtime, "pause", name)
    paused = on_second_version(runtime, "list")
    on_second_version(runtime, "resume", name)
    device = on_second_version(
        runtime, "exec", "--cap", "CAP_MKNOD", name, "sh", "-c", node, status=1
    )
    null = on_second_version(runtime, "exec", name, "sh", "-c", "head -c 3 /dev/zero | wc -c")
    usage = on_second_version(runtime, "events", "--stats", name)
    on_second_version(runtime, "delete", "--force", name)

    assert f"0::/{name}" in own
    assert "paused" in paused
    assert "Operation not permitted" in device
    assert null.strip() == "3"
    assert json.loads(usage)["data"]["cpu"]["usage"]["total"] > 0


def test_a_cgroup_that_others_are_in_is_left_alone(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    first = make_bundle(tmp_path / "a", "sleep", "100", linux={"cgroupsPath": f"/{name}"})
    second = make_bundle(tmp_path / "b", "true", linux={"cgroupsPath": f"/{name}"})
    runtime("run", "--detach", "--bundle", str(first), name)

    output = runtime("run", "--bundle", str(second), f"{name}-2", status=1)

    assert "cgroup is not empty" in output
    assert runtime.status(name) == "running"


def test_a_kill_reaches_all_where_processes_are_the_hosts(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", "sh", "-c", "sleep 100 & sleep 100")
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    kinds = config["linux"]["namespaces"]
    config["linux"]["namespaces"] = [kind for kind in kinds if kind["type"] != "pid"]
    path.write_text(json.dumps(config))
    runtime("run", "--detach", "--bundle", str(bundle), name)
    until(lambda: len(json.loads(runtime("ps", "--format", "json", name))) > 1)

    runtime("kill", name, "KILL")

    until(lambda: left_behind_processes(name) == [])


def left_behind_processes(name: str) -> list[str]:
    return [found for found in left_behind(name) if found.startswith("process")]

"""The same bundles in virtual machines: by an annotation, by an option, by Podman's runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.container.container import ENGINE
from ringfence.machine import state as machines
from tests.framework.bundles import Runtime, left_behind, make_bundle, make_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make containers"),
]

_VM = {"annotations": {ENGINE: "vm"}}
_SCRIPT = Path(__file__).resolve().parents[3] / "packaging/data/scripts/ringfence-oci-vm"


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path / "states")


@pytest.fixture
def waiting(runtime: Runtime, tmp_path: Path) -> Iterator[str]:
    """A machine whose program ends with 9 when it is asked to."""
    script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done"
    bundle = make_bundle(tmp_path, "sh", "-c", script, **_VM)
    runtime("create", "--bundle", str(bundle), "--pid-file", str(tmp_path / "pid"), "rf-vm")
    yield "rf-vm"
    runtime("delete", "--force", "rf-vm")


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_annotation_gives_a_bundle_a_kernel_of_its_own(runtime: Runtime, tmp_path: Path) -> None:
    script = "echo kept > /tmp/../made; uname -r; id -u; id -g; pwd; echo $WORD; hostname; exit 7"
    bundle = make_bundle(
        tmp_path, "sh", "-c", script, **_VM,
        process={"user": {"uid": 3, "gid": 4}, "cwd": "/tmp", "env": ["WORD=one two"]},
        hostname="inside",
    )  # fmt: skip
    (bundle / "rootfs").chmod(0o777)

    output = runtime("run", "--bundle", str(bundle), "rf-vm", status=7, timeout_s=120)

    kernel, *rest = output.splitlines()
    assert kernel != os.uname().release
    assert rest == ["3", "4", "/tmp", "one two", "inside"]
    assert (bundle / "rootfs/made").read_text() == "kept\n"
    assert left_behind("rf-vm") == []


_STATUS = "^(Groups|CapBnd|CapPrm|CapEff|CapInh|CapAmb|NoNewPrivs|Seccomp):"
_REFUSES_MKDIR = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
}


@pytest.mark.parametrize(("promised", "uid", "effective"), [(True, 0, 0x21), (False, 5, 0x01)])
def test_its_program_may_do_what_a_containers_may(
    runtime: Runtime, tmp_path: Path, *, promised: bool, uid: int, effective: int
) -> None:
    script = f"""
        grep -E '{_STATUS}' /proc/self/status | tr -s '[:space:]' ' '; echo
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start; umask; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; mkdir /tmp/x
    """
    bundle = make_bundle(
        tmp_path, "sh", "-c", script, **_VM,
        linux={
            "seccomp": _REFUSES_MKDIR,
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "79"},
        },
        process={
            "user": {"uid": uid, "gid": uid, "additionalGids": [7, 8], "umask": 0o27},
            "noNewPrivileges": promised,
            "oomScoreAdj": 321,
        },
    )  # fmt: skip
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    config["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]
    few, one = ["CAP_CHOWN", "CAP_KILL"], ["CAP_CHOWN"]
    config["process"]["capabilities"] = {
        "bounding": few, "permitted": few, "effective": few if uid == 0 else one,
        "inheritable": one, "ambient": one,
    }  # fmt: skip
    path.write_text(json.dumps(config))

    output = runtime("run", "--bundle", str(bundle), "rf-vm", status=1, timeout_s=120)

    status, *rest = output.splitlines()
    assert status.split() == [
        "Groups:", "7", "8",
        "CapInh:", f"{0x01:016x}",
        "CapPrm:", f"{0x21 if uid == 0 else 0x01:016x}",
        "CapEff:", f"{effective:016x}",
        "CapBnd:", f"{0x21:016x}",
        "CapAmb:", f"{0x01:016x}",
        "NoNewPrivs:", str(int(promised)),
        "Seccomp:", "2",
    ]  # fmt: skip
    assert rest[:5] == ["79", "0027", "77", "88", "321"]
    assert rest[5].endswith("Operation not supported")


def test_the_option_chooses_it_and_refuses_what_there_is_not(
    runtime: Runtime, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path, "true")

    refused = runtime("--engine", "jail", "run", "--bundle", str(bundle), "rf-vm", status=1)
    runtime("--engine", "vm", "run", "--bundle", str(bundle), "rf-vm", timeout_s=120)

    assert "there is no engine 'jail'" in refused


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mounts": [{"destination": "/x", "type": "tmpfs", "source": "tmpfs"}]}, "tmpfs"),
        ({"hooks": {"startContainer": [{"path": "/bin/true"}]}}, "startContainer"),
        ({"linux": {"devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]}},
         "devices"),
        ({"process": {"ioPriority": {"class": "IOPRIO_CLASS_IDLE"}}}, "ioPriority"),
        ({"process": {"rlimits": [{"type": "RLIMIT_LUCK", "soft": 1, "hard": 1}]}}, "RLIMIT_LUCK"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_refused(
    runtime: Runtime, tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    bundle = make_bundle(tmp_path, "true", **_VM, **changes)

    output = runtime("run", "--bundle", str(bundle), "rf-vm", status=1)

    assert word in output
    assert left_behind("rf-vm") == []


def test_its_life_is_a_containers(runtime: Runtime, waiting: str, tmp_path: Path) -> None:
    created = runtime.status(waiting)
    runtime("start", waiting)
    running = runtime.status(waiting)
    executed = runtime(
        "exec", waiting, "sh", "-c", "cat /proc/sys/kernel/osrelease; exit 5", status=5
    )
    runtime("pause", waiting)
    paused = runtime.status(waiting)
    runtime("exec", waiting, "true", status=255)
    runtime("resume", waiting)
    statistics = json.loads(runtime("events", "--stats", waiting))
    refused = runtime("update", "--memory", "64m", waiting, status=1)
    runtime("update", "--cpu-share", "200", waiting)
    pid = runtime.pid(waiting)
    runtime("kill", waiting, "TERM")
    until(lambda: runtime.status(waiting) == "stopped")

    assert (created, running, paused) == ("created", "running", "paused")
    assert executed.strip() != os.uname().release
    assert statistics["data"]["cpu"]["usage"]["total"] > 0
    assert "has what it was started with" in refused
    assert (tmp_path / "pid").read_text() == str(pid)


def test_the_kill_of_its_process_ends_the_machine(runtime: Runtime, waiting: str) -> None:
    runtime("start", waiting)
    names = {entry.record.name for entry in machines.list_machines()}

    runtime("kill", waiting, "KILL")
    until(lambda: runtime.status(waiting) == "stopped")
    runtime("delete", waiting)

    mine = {name for name in names if name.startswith("oci-")}
    assert mine
    assert mine.isdisjoint(entry.record.name for entry in machines.list_machines())
    assert left_behind(waiting) == []


@pytest.fixture
def short() -> Iterator[Path]:
    # Podman's own limit for its directories.
    with tempfile.TemporaryDirectory(prefix="rf-vm-", dir="/tmp") as name:
        yield Path(name)


def test_podman_runs_it_with_terminal_volume_and_exec(short: Path) -> None:
    podman = shutil.which("podman")
    if podman is None:
        pytest.skip("podman isn't installed on this host")
    root = make_root(short / "root")
    with tarfile.open(short / "root.tar", "w") as tar:
        tar.add(root, arcname=".")
    (short / "volume").mkdir()
    (short / "volume/word").write_text("from the host\n")
    base = [
        podman, "--root", f"{short}/p", "--runroot", f"{short}/r",
        "--cgroup-manager", "cgroupfs", "--runtime", str(_SCRIPT),
    ]  # fmt: skip

    def call(*words: str, status: int = 0) -> str:
        # Its monitor makes files in the directory that it is started in.
        done = subprocess.run(
            [*base, *words], cwd=short, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout

    call("import", f"{short}/root.tar", "box")
    try:
        kernel = call("run", "--rm", "--tty", "box", "sh", "-c", "tty; uname -r; exit 3", status=3)
        call("run", "-d", "--name", "one", "-v", f"{short}/volume:/v", "box", "sleep", "100")
        seen = call("exec", "one", "cat", "/v/word")
        call("stop", "--time", "1", "one")
    finally:
        call("rm", "--all", "--force", "--time", "0")
        subprocess.run(["umount", short / "p/overlay"], capture_output=True, check=False)

    assert kernel.split()[0] == "/dev/pts/0"
    assert kernel.split()[1] != os.uname().release
    assert seen == "from the host\n"

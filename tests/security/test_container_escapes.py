"""Ways out of containers that were found in the field, each tried from inside."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

import ringfence
from ringfence.container import init_program
from ringfence.machine import state
from tests.framework.bundles import Runtime, busybox, left_behind, make_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0, reason="needs root: a user's containers have less to win"
    ),
]

NAME = f"rf-escape-{os.getpid()}"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    runtime = Runtime(tmp_path / "states")
    yield runtime
    runtime("delete", "--force", NAME)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ringfence.Machine]:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    with ringfence.Machine(engine="container") as machine:
        yield machine


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def shell(runtime: Runtime, folder: Path, script: str, status: int = 0, **changes: object) -> str:
    bundle = make_bundle(folder, "sh", "-c", script, **changes)
    return runtime("run", "--bundle", str(bundle), NAME, status=status)


# --- The runtime's own program (CVE-2019-5736) -----------------------------------------------


def test_the_setup_program_cannot_be_overwritten_as_proc_self_exe(
    runtime: Runtime, tmp_path: Path
) -> None:
    before = digest(init_program.find())
    bundle = make_bundle(tmp_path / "b", "/proc/self/exe", "3", "4", "5")

    runtime("run", "--bundle", str(bundle), NAME, status=2)

    assert digest(init_program.find()) == before


def test_the_setup_program_cannot_be_overwritten_while_exec_enters(
    runtime: Runtime, tmp_path: Path
) -> None:
    before = digest(init_program.find())
    # Every process but this one and its own children is the runtime's.
    script = (
        "while :; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] || "
        "{ echo owned > $p/exe; } 2>/dev/null && echo written; done; done"
    )
    bundle = make_bundle(tmp_path / "b", "sh", "-c", script)
    with (tmp_path / "out").open("w") as out:
        subprocess.run(
            runtime.command("run", "--detach", "--bundle", str(bundle), NAME),
            stdout=out, stderr=out, check=True, timeout=20,
        )  # fmt: skip

    for _time in range(15):
        runtime("exec", NAME, "true")

    assert digest(init_program.find()) == before


def test_the_copy_of_the_setup_program_is_sealed() -> None:
    copy = init_program.sealed_copy(init_program.find())
    again = os.open(f"/proc/self/fd/{copy}", os.O_RDWR)

    try:
        with pytest.raises(PermissionError):
            os.write(again, b"x")
    finally:
        os.close(again)


# --- Descriptors and directories (CVE-2024-21626, CVE-2016-9962) -------------------------------


def test_no_descriptor_of_the_host_is_left_inside(runtime: Runtime, tmp_path: Path) -> None:
    host = os.open("/", os.O_RDONLY)
    os.set_inheritable(host, True)
    bundle = make_bundle(tmp_path / "b", "sh", "-c", "ls -l /proc/1/fd /proc/self/fd")
    done = subprocess.run(
        runtime.command("run", "--bundle", str(bundle), NAME),
        capture_output=True, text=True, check=True, pass_fds=[host], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(host)

    targets = [line.split(" -> ")[1] for line in done.stdout.splitlines() if " -> " in line]
    assert [
        target for target in targets if not target.startswith(("pipe:", "/dev/null", "/proc"))
    ] == []


@pytest.mark.parametrize("number", range(3, 12))
def test_a_working_directory_by_a_descriptor_of_the_host_is_refused(
    runtime: Runtime, tmp_path: Path, number: int
) -> None:
    bundle = make_bundle(tmp_path / "b", "true", process={"cwd": f"/proc/self/fd/{number}"})

    runtime("run", "--bundle", str(bundle), NAME, status=1)


# --- Links in the image at every place where something is mounted (CVE-2021-30465 and others) ---


@pytest.mark.parametrize("place", ["/way", "/way/below", "/way/below/more"])
def test_a_mount_below_a_link_that_leads_out_stays_inside(
    runtime: Runtime, tmp_path: Path, place: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    mount = {"destination": place, "type": "tmpfs", "source": "tmpfs"}
    bundle = make_bundle(tmp_path / "b", "true", mounts=[mount])
    (bundle / "rootfs/way").symlink_to(f"../../../../../../../..{outside}")

    done = subprocess.run(
        runtime.command("run", "--bundle", str(bundle), NAME), capture_output=True, check=False
    )

    # Refused, or resolved inside the root; never outside.
    assert done.returncode in {0, 1}
    assert list(outside.iterdir()) == []
    assert str(outside) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("name", ["proc", "sys"])
def test_proc_and_sys_on_a_link_are_refused(runtime: Runtime, tmp_path: Path, name: str) -> None:
    bundle = make_bundle(tmp_path / "b", "true")
    (bundle / "rootfs" / name).rmdir()
    (bundle / "rootfs" / name).symlink_to("/tmp")

    assert "ordinary directory" in runtime("run", "--bundle", str(bundle), NAME, status=1)


def test_a_link_in_place_of_a_device_is_not_followed(runtime: Runtime, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    bundle = make_bundle(tmp_path / "b", "true")
    config = json.loads((bundle / "config.json").read_text())
    config["mounts"] = [m for m in config["mounts"] if not m["destination"].startswith("/dev")]
    (bundle / "config.json").write_text(json.dumps(config))
    (bundle / "rootfs/dev/null").symlink_to(victim)

    output = runtime("run", "--bundle", str(bundle), NAME, status=1)

    assert "isn't that device" in output
    assert victim.read_text() == "mine"


def test_a_link_that_is_swapped_while_mounts_are_made_leads_nowhere_else(
    runtime: Runtime, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    mount = {"destination": "/swap/in", "type": "tmpfs", "source": "tmpfs"}
    bundle = make_bundle(tmp_path / "b", "true", mounts=[mount])
    real, link = bundle / "rootfs/swap", bundle / "rootfs/link"
    real.mkdir()
    link.symlink_to(f"../../../../../../..{outside}")
    done = threading.Event()

    renameat2, here, exchange = 316, -100, 2
    call = ctypes.CDLL(None).syscall

    def swap() -> None:
        while not done.is_set():
            call(renameat2, here, bytes(real), here, bytes(link), exchange)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _time in range(20):
            subprocess.run(
                runtime.command("run", "--bundle", str(bundle), NAME),
                capture_output=True,
                check=False,
            )
    finally:
        done.set()
        thread.join()

    assert list(outside.iterdir()) == []
    assert str(outside) not in Path("/proc/self/mountinfo").read_text()


# --- The kernel's own doors ------------------------------------------------------------------


def test_a_node_of_the_hosts_disk_cannot_be_opened(runtime: Runtime, tmp_path: Path) -> None:
    disk = Path("/").stat().st_dev
    script = f"mknod /tmp/d b {os.major(disk)} {os.minor(disk)} && head -c 1 /tmp/d"
    names = ["CAP_MKNOD"]
    capabilities = {"bounding": names, "effective": names, "permitted": names}

    output = shell(
        runtime, tmp_path / "b", script, status=1, process={"capabilities": capabilities}
    )

    assert "Operation not permitted" in output


@pytest.mark.parametrize(
    "path",
    [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sysrq-trigger",
        "/proc/sys/fs/binfmt_misc/register",
        "/sys/kernel/uevent_helper",
        "/sys/fs/cgroup/memory/release_agent",
        "/sys/fs/cgroup/pids/notify_on_release",
    ],
)
def test_the_hosts_settings_cannot_be_written(runtime: Runtime, tmp_path: Path, path: str) -> None:
    output = shell(runtime, tmp_path / "b", f"echo '|/tmp/x' > {path}", status=1)

    assert any(word in output for word in ("Read-only", "nonexistent", "denied", "No such"))


@pytest.mark.parametrize("path", ["/proc/kcore", "/proc/keys", "/proc/timer_list"])
def test_what_tells_of_the_host_is_empty(runtime: Runtime, tmp_path: Path, path: str) -> None:
    assert shell(runtime, tmp_path / "b", f"[ ! -e {path} ] || cat {path} | wc -c").strip() in {
        "0",
        "",
    }


def test_processes_of_the_host_are_not_there(machine: ringfence.Machine) -> None:
    done = machine.run(["sh", "-c", f"kill -0 {os.getpid()}; ls -d /proc/[0-9]* | wc -l"])

    assert "No such process" in done.stderr
    assert int(done.stdout) < 10


@pytest.mark.parametrize("call", [("101", "16"), ("434",)], ids=["ptrace", "pidfd_open"])
def test_processes_of_others_cannot_be_looked_into(
    machine: ringfence.Machine, call: tuple[str, ...]
) -> None:
    with ringfence.Machine(engine="container", network="none") as other:
        other.run(["sh", "-c", "sleep 100 > /dev/null 2>&1 &"])
        theirs = str(other.inspect()["pid"])
        # PTRACE_ATTACH is 16; neither the host's nor another container's have a number inside.
        answers = [
            machine.run(["/usr/bin/python3", "-c", _PROGRAM, *call, pid, "0", "0", "0", "0"]).stdout
            for pid in (str(os.getpid()), theirs)
        ]

    assert answers == ["-1 3\n", "-1 3\n"]


_CALLS = {
    "keyctl": (250, 0, -3, 1),
    "add_key": (248, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "mount": (165, 0, 0, 0),
    "unshare a user namespace": (272, 0x1000_0000),
    "clone a user namespace": (56, 0x1000_0000 | 17, 0),
    "setns": (308, 0, 0),
    "open_by_handle_at": (304, 0, 0, 0),
    "perf_event_open": (298, 0, 0, 0),
    "userfaultfd": (323, 0),
    "io_uring_setup": (425, 1, 0),
    "pivot_root": (155, 0, 0),
    "reboot": (169, 0, 0),
    "kexec_load": (246, 0, 0),
    "init_module": (175, 0, 0),
    "ioctl TIOCSTI": (16, 0, 0x5412, 0),
    "ioctl TIOCSTI with high bits": (16, 0, 0x1_0000_5412, 0),
    "personality that reads implies runs": (135, 0x40_0000),
}
_PROGRAM = (
    "import ctypes, os, sys; c = ctypes.CDLL(None, use_errno=True); "
    "r = c.syscall(*(ctypes.c_long(int(n)) for n in sys.argv[1:])); print(r, ctypes.get_errno())"
)


@pytest.mark.parametrize("name", sorted(_CALLS))
def test_calls_that_lead_out_are_refused(machine: ringfence.Machine, name: str) -> None:
    done = machine.run(["/usr/bin/python3", "-c", _PROGRAM, *map(str, _CALLS[name])])

    assert done.stdout == "-1 1\n", name


def test_clone3_looks_as_on_a_kernel_that_lacks_it(machine: ringfence.Machine) -> None:
    assert machine.run(["/usr/bin/python3", "-c", _PROGRAM, "435", "0", "0"]).stdout == "-1 38\n"


def test_the_agent_has_few_capabilities_and_can_get_no_more(machine: ringfence.Machine) -> None:
    status = machine.run(["cat", "/proc/1/status"]).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    powerful = 1 << 21 | 1 << 19 | 1 << 16 | 1 << 12 | 1 << 27

    assert int(fields["CapBnd"], 16) & powerful == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"


def test_setuid_programs_of_a_volume_have_no_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    volume = tmp_path / "volume"
    volume.mkdir(mode=0o755)
    shutil.copy(busybox(), volume / "busybox")
    (volume / "busybox").chmod(0o4755)
    mount = ringfence.Mount(source=volume, target=PurePosixPath("/v"), read_only=False)

    with ringfence.Machine(engine="container", mounts=[mount]) as machine:
        done = machine.run(["/v/busybox", "id", "-u"], user="1000")

    assert done.stdout == "1000\n"


def test_links_in_a_volume_lead_nowhere_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    secret = tmp_path / "secret"
    secret.write_text("secret")
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "out").symlink_to(secret)
    mount = ringfence.Mount(source=volume, target=PurePosixPath("/v"), read_only=False)

    with ringfence.Machine(engine="container", mounts=[mount]) as machine:
        done = machine.run(["cat", "/v/out"])

    assert done.exit_code == 1
    assert done.stdout == ""


def test_a_container_ends_with_the_process_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    script = (
        "import os, sys, ringfence\n"
        "machine = ringfence.Machine(engine='container').start()\n"
        "print(machine._running.info.pid, machine.id, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    number, name = done.stdout.split()
    pid = int(number)
    end = time.monotonic() + 5
    while time.monotonic() < end and "ringfence" in _command(pid):
        time.sleep(0.02)

    assert "ringfence" not in _command(pid)
    assert state.list_machines() == []
    assert left_behind(name) == []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""

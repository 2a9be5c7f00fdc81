"""A guest from the kernel's first instruction to its last: boot, agent, root file systems, mounts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import GuestError
from ringfence.guest.spec import (
    ExecSpec,
    GuestSetup,
    LayerKind,
    LayerSpec,
    MountSpec,
    MountType,
    RootSpec,
    Writable,
)
from tests.framework.guest import Guest, host_programs, share
from tests.framework.programs import agent_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.framework.vm_process import Json

DISK_BYTES = 32 << 20


def sh(script: str, **fields: str) -> ExecSpec:
    return ExecSpec(argv=("/bin/sh", "-c", script), stdin=False, user=fields.get("user", ""))


def ext4(path: Path, tree: Path) -> Path:
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", tree, path, f"{DISK_BYTES >> 10}k"], check=True
    )
    return path


def disk(stack: contextlib.ExitStack, path: Path, serial: str) -> tuple[Json, int]:
    fd = os.open(path, os.O_RDWR)
    stack.callback(os.close, fd)
    return {"type": "block", "fd": fd, "format": "raw", "serial": serial}, fd


@pytest.fixture(scope="module")
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is shared with the guest, and its disk."""
    folder = tmp_path_factory.mktemp("guest")
    (folder / "shared" / "sub").mkdir(parents=True)
    (folder / "shared" / "file").write_text("from the host\n")
    (folder / "shared" / "sub" / "inner").write_text("inner\n")
    (folder / "tree").mkdir()
    (folder / "tree" / "on-disk").write_text("on the disk\n")
    if shutil.which("mke2fs"):
        ext4(folder / "disk", folder / "tree")
    return folder


@pytest.fixture(scope="module")
def guest(stack: contextlib.ExitStack, folder: Path) -> Iterator[Guest]:
    """The host's programs under an overlay, a shared directory and a disk."""
    root, fds = share(stack, "root", host_programs())
    mounts, more = share(stack, "mounts", {"/0": folder / "shared"})
    devices: list[Json] = [root, mounts, {"type": "rng"}]
    disks = []
    if (folder / "disk").exists():
        device, fd = disk(stack, folder / "disk", "data")
        devices.append(device)
        more.append(fd)
        disks.append(
            MountSpec(type=MountType.BLOCK, source="serial:data", filesystem="ext4", target="/data")
        )
    with Guest(devices=devices, descriptors=[*fds, *more], memory_mib=512) as guest:
        phases = guest.agent.setup(
            GuestSetup(
                root=RootSpec.virtiofs("root"),
                hostname="inside",
                hosts={"elsewhere": "192.0.2.7"},
                sysctls={"kernel.randomize_va_space": "0"},
                mounts=(
                    MountSpec(type=MountType.VIRTIOFS, source="mounts", subpath="/0", target="/w"),
                    MountSpec(
                        type=MountType.VIRTIOFS,
                        source="mounts",
                        subpath="/0/file",
                        target="/etc/one-file",
                        read_only=True,
                    ),
                    MountSpec(type=MountType.TMPFS, target="/scratch", options="size=1m"),
                    *disks,
                ),
            )
        )
        assert {"kernel", "modules", "root", "mounts"} <= set(phases)
        yield guest


def test_the_agent_is_small_and_needs_nothing() -> None:
    program = agent_program().read_bytes()
    assert len(program) < 2 << 20
    assert b"/ld-linux" not in program
    assert b"/ld-musl" not in program


def test_the_kernel_is_the_one_that_was_chosen(guest: Guest) -> None:
    assert guest.agent.kernel == guest.kernel.version
    code, output, _ = guest.run(ExecSpec(argv=("uname", "-r")))
    assert (code, output.decode()) == (0, f"{guest.kernel.version}\n")


def test_it_is_a_machine_of_its_own(guest: Guest) -> None:
    script = "hostname; cat /proc/1/comm; ls /home /root 2>/dev/null; cat /etc/hosts"
    _, output, _ = guest.run(sh(script))
    lines = output.decode().splitlines()
    assert lines[:2] == ["inside", "init"]
    assert "192.0.2.7\telsewhere" in lines
    assert "127.0.1.1\tinside" in lines
    _, output, _ = guest.run(sh("cat /proc/sys/kernel/randomize_va_space; ls /dev/fd/0 /dev/pts"))
    assert output.startswith(b"0\n/dev/fd/0\n")
    # The host's programs have no modules for this kernel.
    assert guest.run(sh("cat /proc/sys/kernel/modprobe"))[1].strip() == b""


def test_exit_codes_streams_and_users(guest: Guest) -> None:
    assert guest.run(sh("echo out; echo err >&2; exit 7")) == (7, b"out\n", b"err\n")
    assert guest.run(ExecSpec(argv=("no-such-program",)))[0] == 127
    assert guest.run(sh("kill -9 $$"))[0] == 137
    assert guest.run(sh("id -un", user="daemon"))[1] == b"daemon\n"
    data = os.urandom(1 << 20)
    assert guest.run(ExecSpec(argv=("cat",)), data)[1] == data


def test_a_hundred_megabytes_arrive_whole(guest: Guest) -> None:
    code, output, _ = guest.run(sh("head -c 100000000 /dev/zero"))
    assert code == 0
    assert len(output) == 100_000_000


def test_the_root_is_written_in_memory_alone(guest: Guest) -> None:
    script = "echo changed > /usr/ringfence-test && cat /usr/ringfence-test && rm /etc/passwd"
    assert guest.run(sh(script))[:2] == (0, b"changed\n")
    assert not Path("/usr/ringfence-test").exists()
    assert Path("/etc/passwd").exists()


def test_directories_files_and_memory_are_mounted(guest: Guest) -> None:
    assert guest.run(sh("cat /w/file /w/sub/inner"))[1] == b"from the host\ninner\n"
    assert guest.run(sh("cat /etc/one-file; echo x > /etc/one-file"))[:2] == (
        2,
        b"from the host\n",
    )
    assert guest.run(sh("touch /w/new"))[0] == 1
    assert guest.run(sh("head -c 2000000 /dev/zero > /scratch/big"))[0] == 1
    # Where file systems lie before parts of them are shown, nothing is left.
    assert guest.run(sh("ls /run/ringfence; grep -c /run/ringfence /proc/mounts"))[1] == b"0\n"


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="needs mke2fs to make a disk")
def test_a_disk_is_found_by_its_serial_number(guest: Guest) -> None:
    code, output, _ = guest.run(sh("cat /data/on-disk; echo guest > /data/by-guest; df /data"))
    assert code == 0
    assert output.startswith(b"on the disk\n")
    assert b"/dev/vda" in output


def test_files_go_in_and_out(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    data = os.urandom(3 << 20)
    (tmp_path / "tree" / "sub" / "file").write_bytes(data)
    guest.agent.files.copy_in(tmp_path / "tree", "/tmp/tree")
    assert guest.agent.files.read("/tmp/tree/sub/file") == data
    guest.agent.files.copy_out("/tmp/tree", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "file").read_bytes() == data


def test_the_clock_is_the_hosts(guest: Guest) -> None:
    guest.agent.sync_time()
    _, output, _ = guest.run(sh("date +%s.%N"))
    assert abs(float(output) - time.time()) < 2


def test_stats_are_the_guests(guest: Guest) -> None:
    stats = guest.agent.stats()
    assert stats.cpus == 1
    assert stats.memory_total_bytes < 512 << 20


def test_a_step_of_the_setup_that_fails_is_named() -> None:
    with Guest() as guest:
        setup = GuestSetup(root=RootSpec.virtiofs("nothing"))
        with pytest.raises(GuestError, match="cannot mount virtiofs nothing"):
            guest.agent.setup(setup)


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="needs mke2fs to make a disk")
def test_a_disk_as_root_keeps_what_is_written_and_powers_off(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    # The one static program that is surely there: it says how it is called, and fails.
    shutil.copy(agent_program(), tree / "bin" / "program")
    image = ext4(tmp_path / "disk", tree)
    with contextlib.ExitStack() as stack:
        device, fd = disk(stack, image, "root")
        with Guest(devices=[device], descriptors=[fd]) as guest:
            root = RootSpec.block("serial:root", "ext4", writable=Writable.DIRECT)
            guest.agent.setup(GuestSetup(root=root))
            code, _, errors = guest.run(ExecSpec(argv=("/bin/program",)))
            assert code == 2
            assert b"usage" in errors
            guest.agent.files.write("/kept", b"for good")
            guest.agent.power_off(grace_s=1)
            assert guest.vm.wait_exit(30)["reason"] == "poweroff"
    # The outside witness, which also sees whether it was unmounted in order.
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
    header = subprocess.run(["dumpe2fs", "-h", image], check=True, capture_output=True).stdout
    assert b"needs_recovery" not in header
    show = ["debugfs", "-R", "cat /kept", str(image)]
    assert subprocess.run(show, check=True, capture_output=True).stdout == b"for good"


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="needs mke2fs to make a disk")
def test_layers_are_joined_lowest_first(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    upper = tmp_path / "tree"
    (upper / "etc").mkdir(parents=True)
    (upper / "etc" / "os-release").write_text("from the disk\n")
    programs, fds = share(stack, "root", host_programs())
    device, fd = disk(stack, ext4(tmp_path / "disk", upper), "upper")
    layers = (
        LayerSpec(kind=LayerKind.VIRTIOFS, source="root"),
        LayerSpec(kind=LayerKind.BLOCK, source="serial:upper", filesystem="ext4"),
    )
    with Guest(devices=[programs, device], descriptors=[*fds, fd]) as guest:
        guest.agent.setup(GuestSetup(root=RootSpec(layers=layers, writable=Writable.NO)))
        script = "cat /etc/os-release; echo x > /tmp/x; cat /tmp/x; echo x > /usr/x"
        assert guest.run(sh(script))[:2] == (2, b"from the disk\nx\n")

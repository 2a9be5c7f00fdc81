"""Disk images as root file systems."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import RingfenceError
from ringfence.machine.machine import Machine
from tests.functional.disks import make_disk, make_partitioned_disk, mounted

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.machine.options import MachineOptions
    from ringfence.machine.spec import EngineName

pytestmark = pytest.mark.usefixtures("session_state")


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_disk_as_the_root(engine: EngineName, tmp_path: Path, disk_format: str) -> None:
    disk = make_disk(tmp_path, disk_format)
    options: MachineOptions = {"engine": engine, "disk": disk, "disk_format": disk_format}  # type: ignore[typeddict-item]
    before = hashlib.sha256(disk.read_bytes()).digest()
    with Machine(**options) as machine:
        assert machine.run(["/bin/busybox", "cat", "/hello"]).stdout == "on disk\n"
        machine.files.write("/written", b"in memory")
    assert hashlib.sha256(disk.read_bytes()).digest() == before
    with Machine(**(options | {"writable": True})) as machine:
        machine.files.write("/written", b"for good")
    with Machine(**options) as machine:
        assert machine.files.read("/written") == b"for good"
    if disk_format == "qcow2":
        subprocess.run(["qemu-img", "check", disk], check=True, capture_output=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount the image on the host")
@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_what_a_guest_writes_is_what_the_host_reads(
    engine: EngineName, tmp_path: Path, disk_format: str
) -> None:
    disk = make_disk(tmp_path, disk_format)
    options: MachineOptions = {"engine": engine, "disk": disk, "disk_format": disk_format}  # type: ignore[typeddict-item]
    script = """
        for number in 1 2 3 4 5; do dd if=/dev/urandom of=/file$number bs=100k count=$number; done
        rm /file3; truncate -s 9M /sparse; echo end >> /sparse
        exec sha256sum /file1 /file2 /file4 /file5 /sparse
    """
    with Machine(**(options | {"writable": True})) as machine:
        machine.run(["/bin/busybox", "--install", "/bin"], check=True)
        inside = machine.run(["/bin/sh", "-c", script], check=True).stdout
    raw = disk
    if disk_format == "qcow2":
        subprocess.run(["qemu-img", "check", disk], check=True, capture_output=True)
        raw = tmp_path / "converted.raw"
        convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw)]
        subprocess.run(convert, check=True)
    subprocess.run(["e2fsck", "-f", "-n", raw], check=True, capture_output=True)
    with mounted(raw, tmp_path / "mounted") as place:
        hashes = [line.split() for line in inside.splitlines()]
        outside = {
            name: hashlib.sha256((place / name[1:]).read_bytes()).hexdigest() for _, name in hashes
        }
    assert outside == {name: digest for digest, name in hashes}
    assert len(outside) == 5


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_the_root_is_found_on_a_partitioned_disk(
    engine: EngineName, tmp_path: Path, filesystem: str
) -> None:
    disk = make_partitioned_disk(tmp_path, filesystem)
    with Machine(engine=engine, disk=disk, disk_format="raw", writable=True) as machine:
        machine.files.write("/written", b"for good")
        mounts = machine.files.read("/proc/mounts").decode()
    assert f"/dev/root / {filesystem} rw" in mounts or f"/dev/vda2 / {filesystem} rw" in mounts
    with Machine(
        engine=engine, disk=disk, disk_format="raw", disk_partition=2, disk_filesystem=filesystem
    ) as machine:
        assert machine.files.read("/written") == b"for good"


def test_a_partition_that_is_not_there_is_said(engine: EngineName, tmp_path: Path) -> None:
    disk = make_partitioned_disk(tmp_path, "ext4")
    with pytest.raises(RingfenceError, match="no partition 7"):
        Machine(engine=engine, disk=disk, disk_format="raw", disk_partition=7).start()


def test_a_disk_is_as_slow_as_it_is_told_to_be(engine: EngineName, tmp_path: Path) -> None:
    disk = make_disk(tmp_path, "raw")
    with Machine(engine=engine, disk=disk, disk_format="raw", disk_bandwidth="1M") as machine:
        command = ["/bin/busybox", "dd", "if=/dev/vda", "of=/dev/null", "bs=64k", "count=64"]
        begin = time.monotonic()
        machine.run(command, check=True)
        took = time.monotonic() - begin
        machine_stats = machine.stats()
    # Four seconds' worth, of which a second's may come at once.
    assert took > 2.5
    devices = machine_stats["devices"]
    assert isinstance(devices, dict)
    assert devices["block0"]["throttled"] > 0

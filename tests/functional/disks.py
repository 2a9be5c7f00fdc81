"""Disk images for the tests, made without mounting anything."""

from __future__ import annotations

import struct
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def make_disk(folder: Path, disk_format: str) -> Path:
    """An ext4 file system with one program and one file."""
    tree = folder / "tree"
    (tree / "bin").mkdir(parents=True)
    busybox = subprocess.run(["which", "busybox"], check=True, capture_output=True, text=True)
    subprocess.run(["cp", busybox.stdout.strip(), tree / "bin/busybox"], check=True)
    (tree / "hello").write_text("on disk\n")
    raw = folder / "disk.raw"
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(raw), "32M"]
    subprocess.run(command, check=True, capture_output=True)
    if disk_format == "raw":
        return raw
    qcow2 = folder / "disk.qcow2"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2)]
    subprocess.run(convert, check=True)
    return qcow2


def make_partitioned_disk(folder: Path, filesystem: str) -> Path:
    """A disk with something unknown on its first partition, and a root on its second."""
    tree = make_disk(folder, "raw").parent / "tree"
    part = folder / "part.raw"
    with part.open("wb") as file:
        # The least that xfs takes.
        file.truncate(300 << 20)
    make = {
        "ext4": ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(part)],
        "xfs": ["mkfs.xfs", "-q", str(part)],
    }
    subprocess.run(make[filesystem], check=True, capture_output=True)
    entries = [(0x83, 2048, 2048), (0x83, 4096, part.stat().st_size // 512)]
    table = b"".join(
        bytes([0, 0, 0, 0, kind, 0, 0, 0]) + struct.pack("<II", first, count)
        for kind, first, count in entries
    )
    disk = folder / "parts.raw"
    disk.write_bytes(bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa")
    copy = ["dd", f"if={part}", f"of={disk}", "bs=1M", "seek=2", "conv=sparse,notrunc"]
    subprocess.run(copy, check=True, capture_output=True)
    with disk.open("r+b") as file:
        file.truncate((2 << 20) + part.stat().st_size)
    return disk


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """A raw image on the host, read only, by the host's own kernel; needs root."""
    place.mkdir()
    subprocess.run(["mount", "-o", "loop,ro", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)

"""What disk images say of themselves, and those that lie."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, FormatError, NotFoundError
from ringfence.machine import disk

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 1 << 16


def qcow2(
    backing: str = "", backing_format: str = "", *, crypt: int = 0, version: int = 3
) -> bytes:
    """An empty image: header, L1 table, reference counts."""
    extensions = b""
    if backing_format:
        name = backing_format.encode()
        extensions += struct.pack(">II", 0xE2792ACA, len(name)) + name + bytes(-len(name) % 8)
    extensions += bytes(8)
    position = 104 + len(extensions) if backing else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", version, position, len(backing), 16, 1 << 20, crypt, 1),
        *(CLUSTER, 2 * CLUSTER, 1, 0, 0),
    )
    head += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    return (head + extensions + backing.encode()).ljust(3 * CLUSTER, b"\0")


def test_a_chain_is_followed_with_the_formats_that_it_states(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(4096))
    (tmp_path / "middle").write_bytes(qcow2("base.raw", "raw"))
    (tmp_path / "top").write_bytes(qcow2(str(tmp_path / "middle"), "qcow2"))
    found = [(image.path.name, image.format) for image in disk.chain(tmp_path / "top", "qcow2")]
    assert found == [("top", "qcow2"), ("middle", "qcow2"), ("base.raw", "raw")]


def test_an_unstated_format_behind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "top").write_bytes(qcow2("base.raw"))
    with pytest.raises(FormatError, match="never guessed") as error:
        disk.chain(tmp_path / "top", "qcow2")
    assert "qemu-img rebase" in error.value.hint


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a qcow2 image"),
        (bytes(1 << 20), "not a qcow2 image"),
        (qcow2()[:20], "cut short: its header"),
        (qcow2()[: CLUSTER + 3], "cut short: its table of clusters"),
        (qcow2()[: 2 * CLUSTER], "cut short: its reference counts"),
        (qcow2(crypt=1), "encrypted"),
        (qcow2(version=9), "version 9"),
        (qcow2("nbd://host/export", "raw"), "no file"),
        (qcow2("x", "vmdk"), "'vmdk'"),
    ],
)
def test_bad_images_are_said_to_be(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        disk.chain(path, "qcow2")


def test_an_image_behind_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(qcow2("disk", "qcow2"))
    with pytest.raises(FormatError, match="overlay of itself"):
        disk.chain(path, "qcow2")


def test_raw_disks_have_whole_sectors(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1000))
    with pytest.raises(FormatError, match="1000 bytes long"):
        disk.chain(path, "raw")


def test_missing_and_misplaced_paths(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no disk image"):
        disk.chain(tmp_path / "none", "raw")
    with pytest.raises(ConfigError, match="directory or special file"):
        disk.chain(tmp_path, "raw")

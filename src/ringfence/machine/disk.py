"""Disk images: what they say of themselves is checked before a machine is started on them.

The VM process parses the image (crates/block); here are the checks whose answer a user can act on,
and the chain of backing files, which the VM process can't open itself.

Source: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from ringfence.errors import ConfigError, FormatError, HostError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.machine.document import Json
    from ringfence.machine.spec import DiskFormat, DiskRate

__all__ = ["DiskImage", "chain", "limits"]

_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_MAX_CHAIN = 16
_MAX_NAME = 1023
_SECTOR = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskImage:
    """One image file.

    Args:
        path: Where it is.
        format: How it is stored.
    """

    path: Path
    format: DiskFormat


def chain(path: Path, disk_format: DiskFormat) -> list[DiskImage]:
    """An image and those behind it, nearest first.

    Raises:
        NotFoundError: A file of the chain doesn't exist.
        FormatError: An image isn't what it is said to be, or is cut short.
        ConfigError: The path is no file.
        HostError: It can't be read.
    """
    images = [DiskImage(path=path, format=disk_format)]
    while (backing := _check(images[-1])) is not None:
        if backing.path in [image.path for image in images]:
            message = f"{path} is an overlay of itself, by {backing.path}"
            raise FormatError(message)
        if len(images) >= _MAX_CHAIN:
            message = f"{path} has more than {_MAX_CHAIN} images behind it"
            raise FormatError(message, hint=f"join them: qemu-img rebase -b '' {path}")
        images.append(backing)
    return images


def limits(rate: DiskRate) -> Json:
    """A disk's limits as its device has them; nothing when there are none."""
    given: Json = {}
    if rate.bytes_per_s is not None:
        given["bytes_per_s"] = rate.bytes_per_s
    if rate.requests_per_s is not None:
        given["ops_per_s"] = rate.requests_per_s
    return {"rate": given} if given else {}


def _check(image: DiskImage) -> DiskImage | None:
    """Checks one image and says what is behind it."""
    try:
        if not image.path.is_file() and not image.path.is_block_device():
            if not image.path.exists():
                message = f"there is no disk image {image.path}"
                raise NotFoundError(message)
            message = f"{image.path} is a directory or special file, not a disk image"
            raise ConfigError(message)
        with image.path.open("rb") as file:
            if image.format == "qcow2":
                return _check_qcow2(image.path, file)
            _check_raw(image.path, file)
            return None
    except OSError as error:
        if isinstance(error, HostError):
            raise
        message = f"cannot read the disk image {image.path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(image.path)) from error


def _check_raw(path: Path, file: BinaryIO) -> None:
    size = file.seek(0, 2)
    if size == 0 or size % _SECTOR:
        message = f"{path} is {size} bytes long; a raw disk is a multiple of {_SECTOR} bytes"
        raise FormatError(message)


def _check_qcow2(path: Path, file: BinaryIO) -> DiskImage | None:
    head = file.read(_HEADER.size)
    if head[:4] != _MAGIC:
        message = f"{path} is not a qcow2 image: it doesn't begin as one"
        raise FormatError(message, hint="if it is a raw disk, say so: --disk-format raw")
    if len(head) < _HEADER.size:
        raise _cut_short(path, "its header")
    fields = _HEADER.unpack(head)
    version, name_offset, name_length = fields[1:4]
    cluster_bits, crypt_method, l1_entries = fields[4], fields[6], fields[7]
    l1_offset, refcount_offset, refcount_clusters = fields[8:11]
    if version not in (2, 3):
        message = f"{path} is of qcow2 version {version}; versions 2 and 3 are known"
        raise FormatError(message)
    if crypt_method:
        message = f"{path} is encrypted, which isn't supported"
        raise FormatError(message, hint=f"decrypt it: qemu-img convert {path} ...")
    if not 9 <= cluster_bits <= 21:
        message = f"{path} is corrupt: clusters of 2^{cluster_bits} bytes"
        raise FormatError(message)
    size = file.seek(0, 2)
    if l1_offset + 8 * l1_entries > size:
        raise _cut_short(path, "its table of clusters")
    if refcount_offset + (refcount_clusters << cluster_bits) > size:
        raise _cut_short(path, "its reference counts")
    if not name_offset:
        return None
    if name_length > _MAX_NAME or name_offset + name_length > size:
        message = f"{path} is corrupt: the name of its backing file lies outside"
        raise FormatError(message)
    file.seek(name_offset)
    name = file.read(name_length).decode(errors="surrogateescape")
    return DiskImage(path=_resolve(path, name), format=_backing_format(path, file, version))


def _cut_short(path: Path, what: str) -> FormatError:
    message = f"{path} is cut short: {what} lies beyond its end"
    return FormatError(message, hint=f"copy it again, or look at it: qemu-img check {path}")


def _resolve(path: Path, name: str) -> Path:
    """The backing file's path, which is relative to the image that names it."""
    if ":" in name.split("/", 1)[0]:
        message = f"{path} is an overlay of {name!r}, which is no file"
        raise FormatError(message)
    return (path.parent / name).absolute()


def _backing_format(path: Path, file: BinaryIO, version: int) -> DiskFormat:
    """What the image says about its backing file's format; it is never guessed."""
    position = 72
    if version == 3:
        file.seek(100)
        position = int.from_bytes(file.read(4), "big")
    for _ in range(64):
        file.seek(position)
        head = file.read(_EXTENSION.size)
        if len(head) < _EXTENSION.size:
            break
        kind, length = _EXTENSION.unpack(head)
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            found = file.read(min(length, 16)).decode(errors="replace")
            if found in ("raw", "qcow2"):
                return cast("DiskFormat", found)
            message = f"{path} is an overlay of an image of format {found!r}, which isn't supported"
            raise FormatError(message)
        position += _EXTENSION.size + (length + 7) // 8 * 8
    message = f"{path} doesn't say the format of the image behind it, and it is never guessed"
    raise FormatError(message, hint=f"write it down: qemu-img rebase -u -b BACKING -F raw {path}")

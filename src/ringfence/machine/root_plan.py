"""How a machine's root file system and mounts become devices, and what the guest is told of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ringfence.guest.spec import (
    MountSpec,
    MountType,
    RootSpec,
    Writable,
)
from ringfence.machine import disk, host_root
from ringfence.machine.spec import DirectoryRoot, DiskRoot, HostRoot, ImageRoot

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ringfence.machine.document import Document, Json
    from ringfence.machine.spec import DiskRate, Mount, Root

__all__ = ["add_mounts", "add_root", "extra_mounts", "modules"]

_ROOT_TAG = "root"
_MOUNTS_TAG = "mounts"
# The guest finds its root disk by this serial number.
_ROOT_SERIAL = "root"
# What the guest may find on a disk, besides what every guest knows.
_LARGE_FILESYSTEMS = ("btrfs", "xfs")


def add_root(document: Document, root: Root, folder: Path, rate: DiskRate) -> RootSpec:
    """Adds the root's device to the document.

    Args:
        document: Gets it.
        root: What it is.
        folder: For files of the machine's own.
        rate: How fast it may be, if it is a disk.

    Raises:
        HostError: A file can't be opened.
        ConfigError: An image is for another kind of processor.
    """
    match root:
        case HostRoot():
            document.add_device("fs", tag=_ROOT_TAG, entries=host_root.entries(document, folder))
            return RootSpec.virtiofs(_ROOT_TAG)
        case DirectoryRoot():
            fd = document.give_file(root.path, os.O_RDONLY | os.O_DIRECTORY)
            entry: Json = {"path": "/", "fd": fd, "ids": _ids(), "read_only": not root.writable}
            document.add_device("fs", tag=_ROOT_TAG, entries=[entry])
            return RootSpec.virtiofs(_ROOT_TAG, writable=_writable(direct=root.writable))
        case DiskRoot():
            _add_disk(document, root, rate)
            part = "any" if root.partition is None else str(root.partition or "")
            source = f"serial:{_ROOT_SERIAL}/{part}".removesuffix("/")
            writable = _writable(direct=root.writable)
            return RootSpec.block(source, root.filesystem or "auto", writable=writable)
        case ImageRoot():
            # Most machines have no image, and the store takes its time to import.
            from ringfence.machine import image_plan  # noqa: PLC0415

            return image_plan.add_image(document, root, disk.limits(rate))


def _ids() -> str:
    """Who owns shared files, seen from the guest.

    Root's own view is passed on to a guest that root started. An ordinary user can only make files
    of its own, so all are the guest root's.
    """
    return "host" if os.geteuid() == 0 else "squash:0:0"


def _writable(*, direct: bool) -> Writable:
    return Writable.DIRECT if direct else Writable.OVERLAY


def _add_disk(document: Document, root: DiskRoot, rate: DiskRate) -> None:
    first, *behind = disk.chain(root.path, root.format)
    fd = document.give_file(first.path, os.O_RDWR if root.writable else os.O_RDONLY)
    backing = [{"fd": document.give_file(image.path), "format": image.format} for image in behind]
    document.add_device(
        "block",
        fd=fd,
        format=first.format,
        backing=backing,
        read_only=not root.writable,
        serial=_ROOT_SERIAL,
        **disk.limits(rate),
    )


def modules(root: Root) -> tuple[str, ...]:
    """Modules for the file system of a disk that are too large for every guest to unpack."""
    if not isinstance(root, DiskRoot):
        return ()
    return (root.filesystem,) if root.filesystem else _LARGE_FILESYSTEMS


def extra_mounts(root: Root) -> list[MountSpec]:
    """What a guest with this root mounts besides."""
    if isinstance(root, HostRoot):
        options = "mode=1777"
        return [MountSpec(type=MountType.TMPFS, target="/var/tmp", options=options)]  # noqa: S108
    return []


def add_mounts(
    document: Document, mounts: Sequence[Mount], owner: tuple[int, int]
) -> list[MountSpec]:
    """Adds one device for all mounts.

    Args:
        document: Gets it.
        mounts: What is shared.
        owner: The guest's user and group that the files belong to.

    Raises:
        HostError: A source can't be opened.
    """
    entries: list[Json] = []
    told = []
    for number, mount in enumerate(mounts):
        flags = os.O_RDONLY
        if mount.source.is_file() and not mount.read_only:
            flags = os.O_RDWR
        name = f"m{number}"
        entries.append(
            {
                "path": name,
                "fd": document.give_file(mount.source, flags),
                "read_only": mount.read_only,
                "ids": f"squash:{owner[0]}:{owner[1]}",
            }
        )
        told.append(
            MountSpec(
                type=MountType.VIRTIOFS,
                source=_MOUNTS_TAG,
                subpath=f"/{name}",
                target=str(mount.target),
                read_only=mount.read_only,
            )
        )
    if entries:
        document.add_device("fs", tag=_MOUNTS_TAG, entries=entries)
    return told

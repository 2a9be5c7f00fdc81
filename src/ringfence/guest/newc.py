"""The archive form that kernels unpack at their start.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Entry", "archive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One member, owned by root, of time 0: equal contents make equal archives.

    Args:
        name: Its path without a leading slash; its directory must come before it.
        mode: Type and permissions, as stat(2) has them.
        data: A file's content or a link's target.
        node: Of a device node: major and minor number.
    """

    name: str
    mode: int
    data: bytes = b""
    node: tuple[int, int] = (0, 0)

    @classmethod
    def directory(cls, name: str) -> Self:
        """A directory."""
        return cls(name=name, mode=stat.S_IFDIR | 0o755)

    @classmethod
    def file(cls, name: str, data: bytes, mode: int = 0o644) -> Self:
        """A regular file."""
        return cls(name=name, mode=stat.S_IFREG | mode, data=data)

    @classmethod
    def device(cls, name: str, mode: int, major: int, minor: int) -> Self:
        """A character device."""
        return cls(name=name, mode=stat.S_IFCHR | mode, node=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of all entries, in their order."""
    parts = [_member(inode, entry) for inode, entry in enumerate(entries, start=1)]
    parts.append(_member(0, Entry(name="TRAILER!!!", mode=0)))
    return b"".join(parts)


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.node
    # inode, mode, uid, gid, links, mtime, size, device, device of a node, name's length, checksum
    fields = (
        *(inode, entry.mode, 0, 0, links, 0, len(entry.data)),
        *(0, 0, major, minor, len(name), 0),
    )
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)

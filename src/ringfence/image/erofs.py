"""Read-only EROFS images of whole trees, as disks for machines.

Uncompressed: what a guest reads is what lies on disk. Owners, device nodes and attributes are as
the image has them, whoever writes it: no privileges are needed. Equal trees give equal bytes.

Source: Linux Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h (since 5.4).
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ringfence.image.merged import Node

__all__ = ["write_erofs"]

BLOCK = 4096
_SLOT = 32
_SUPER_AT = 1024
_MAGIC = 0xE0F5E1E2
_COMPAT_MTIME = 2
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBx")
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sI44x")
_PLAIN, _INLINE = 0, 2
_XATTR_HEADER = 12
_PREFIXES = (
    ("user.", 1), ("system.posix_acl_access", 2), ("system.posix_acl_default", 3),
    ("trusted.", 4), ("security.", 6),
)  # fmt: skip
_TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6, stat.S_IFLNK: 7,
}  # fmt: skip
_SMALL = 1 << 16
_MAX_TAIL_MOVED = 1024


class _Inode:
    """A node and where it goes."""

    __slots__ = ("block", "data", "inline", "nid", "node", "number", "parent", "size", "xattrs")

    def __init__(self, node: Node, number: int, parent: _Inode | None) -> None:
        self.node = node
        self.number = number
        self.parent = parent or self
        self.xattrs = _xattrs(node)
        self.data = b""
        self.size = 0
        self.nid = 0
        self.block = 0
        self.inline = 0


def write_erofs(root: Node, path: Path, uuid: bytes = bytes(16)) -> None:
    """Write a tree as an image.

    Args:
        root: The tree.
        path: The image; must not exist.
        uuid: 16 bytes that identify it.

    Raises:
        OSError: It can't be written, or a file of the tree can't be read.
        FormatError: It doesn't fit the format, or changed meanwhile.
    """
    inodes = _number(root)
    by_node = {id(inode.node): inode for inode in inodes}
    for inode in inodes:
        _measure(inode)
    meta_end = _place(inodes)
    blocks = _allot(inodes, -(-meta_end // BLOCK))
    if inodes[0].nid > 0xFFFF or blocks > 0xFFFFFFFF:
        msg = f"the image is too large for EROFS: {blocks} blocks"
        raise FormatError(msg)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, blocks * BLOCK)
        meta = bytearray(-(-meta_end // BLOCK) * BLOCK)
        _SUPER.pack_into(
            meta, _SUPER_AT, _MAGIC, 0, _COMPAT_MTIME, 12, 0, inodes[0].nid, len(inodes),
            0, 0, blocks, 0, 0, uuid, bytes(16), 0,
        )  # fmt: skip
        for inode in inodes:
            if inode.node.children is not None:
                inode.data = b"".join(_directory(inode, by_node))
            _write(inode, meta, fd)
        os.pwrite(fd, meta, 0)
    finally:
        os.close(fd)


def _number(root: Node) -> list[_Inode]:
    """All inodes, each once, in the order in which they are laid out."""
    found = [_Inode(root, 1, None)]
    seen = {id(root)}
    at = 0
    while at < len(found):
        inode = found[at]
        at += 1
        children = inode.node.children
        for name in sorted(children or ()):
            child = (children or {})[name]
            if id(child) not in seen:
                seen.add(id(child))
                found.append(_Inode(child, len(found) + 1, inode))
    return found


def _measure(inode: _Inode) -> None:
    """The length of the data; that of directories and links is known now."""
    node = inode.node
    if node.children is not None:
        inode.size = sum(_chunk_sizes(node))
    elif stat.S_ISLNK(node.mode):
        inode.data = os.fsencode(Path(node.source).readlink())
        inode.size = len(inode.data)
    elif stat.S_ISREG(node.mode):
        inode.size = node.size


def _names(node: Node) -> list[bytes]:
    return sorted([b".", b"..", *(node.children or ())])


def _chunks(names: list[bytes]) -> Iterator[tuple[list[bytes], int]]:
    """The names of each block of a directory, and the bytes that they take."""
    chunk: list[bytes] = []
    used = 0
    for name in names:
        need = _DIRENT.size + len(name)
        if used + need > BLOCK:
            yield chunk, used
            chunk, used = [], 0
        chunk.append(name)
        used += need
    yield chunk, used


def _chunk_sizes(node: Node) -> list[int]:
    sizes = [used for _, used in _chunks(_names(node))]
    return [BLOCK] * (len(sizes) - 1) + sizes[-1:]


def _directory(inode: _Inode, by_node: dict[int, _Inode]) -> Iterator[bytes]:
    """The blocks of a directory: entries, then their names."""
    node = inode.node
    chunks = list(_chunks(_names(node)))
    for index, (names, used) in enumerate(chunks):
        offset = _DIRENT.size * len(names)
        entries: list[bytes] = []
        for name in names:
            if name == b".":
                target = inode
            elif name == b"..":
                target = inode.parent
            else:
                target = by_node[id((node.children or {})[name])]
            kind = _TYPES[stat.S_IFMT(target.node.mode)]
            entries.append(_DIRENT.pack(target.nid, offset, kind))
            offset += len(name)
        block = b"".join(entries) + b"".join(names)
        yield block if index == len(chunks) - 1 else block + bytes(BLOCK - used)


def _xattrs(node: Node) -> bytes:
    """The attributes as they follow the inode."""
    body = b""
    for name, value in sorted(node.attributes.items()):
        for prefix, index in _PREFIXES:
            if name.startswith(prefix):
                rest = os.fsencode(name[len(prefix) :])
                entry = struct.pack("<BBH", len(rest), index, len(value)) + rest + value
                body += entry + bytes(-len(entry) % 4)
                break
    return bytes(_XATTR_HEADER) + body if body else b""


def _place(inodes: list[_Inode]) -> int:
    """Give each inode its place; the tail of its data follows it where it fits in the block."""
    at = _SUPER_AT + 128
    for inode in inodes:
        head = _INODE.size + len(inode.xattrs)
        tail = inode.size % BLOCK
        if tail and (at + head) % BLOCK + tail > BLOCK and tail <= _MAX_TAIL_MOVED:
            at = -(-at // BLOCK) * BLOCK
        inode.inline = tail if (at + head) % BLOCK + tail <= BLOCK else 0
        inode.nid = at // _SLOT
        at += head + inode.inline
        at = -(-at // _SLOT) * _SLOT
    return at


def _allot(inodes: list[_Inode], block: int) -> int:
    """Give each inode's data its blocks; returns the number of all blocks."""
    for inode in inodes:
        count = -(-(inode.size - inode.inline) // BLOCK)
        if count:
            inode.block = block
            block += count
    return block


def _write(inode: _Inode, meta: bytearray, fd: int) -> None:
    node = inode.node
    at = inode.nid * _SLOT
    if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        major, minor = os.major(node.rdev), os.minor(node.rdev)
        where = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    else:
        where = inode.block if inode.size > inode.inline else 0xFFFFFFFF
    layout = _INLINE if inode.inline else _PLAIN
    count = (len(inode.xattrs) - _XATTR_HEADER) // 4 + 1 if inode.xattrs else 0
    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
    _INODE.pack_into(
        meta, at, 1 | layout << 1, count, node.mode, 0, inode.size, where & 0xFFFFFFFF,
        inode.number, node.uid, node.gid, seconds & 0xFFFFFFFFFFFFFFFF, nanoseconds, node.links,
    )  # fmt: skip
    at += _INODE.size
    meta[at : at + len(inode.xattrs)] = inode.xattrs
    at += len(inode.xattrs)
    if not inode.size:
        return
    whole = inode.size - inode.inline
    if stat.S_ISREG(node.mode) and inode.size > _SMALL:
        tail = _copy(inode, fd)
    else:
        data = _read(inode) if stat.S_ISREG(node.mode) else inode.data
        tail = data[whole:]
        if whole:
            os.pwrite(fd, data[:whole], inode.block * BLOCK)
    meta[at : at + len(tail)] = tail


def _read(inode: _Inode) -> bytes:
    source = os.open(inode.node.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        data = os.read(source, _SMALL + 1)
    finally:
        os.close(source)
    if len(data) != inode.size:
        raise _changed(inode)
    return data


def _copy(inode: _Inode, fd: int) -> bytes:
    """Copy the whole blocks of a large file within the kernel; returns its tail."""
    source = os.open(inode.node.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        left = inode.size - inode.inline
        os.lseek(fd, inode.block * BLOCK, os.SEEK_SET)
        offset = 0
        while left:
            done = os.sendfile(fd, source, offset, min(left, 1 << 30))
            if not done:
                raise _changed(inode)
            offset += done
            left -= done
        tail = os.pread(source, inode.inline, offset)
    finally:
        os.close(source)
    if len(tail) != inode.inline:
        raise _changed(inode)
    return tail


def _changed(inode: _Inode) -> FormatError:
    return FormatError(f"{inode.node.source} changed while it was being copied")

"""Directory trees as layers: sorted, with hard links, attributes and whiteouts, nothing by chance."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import HostError
from ringfence.image.changes import is_opaque, is_whiteout, walk_layer
from ringfence.image.ownership import OVERRIDE
from ringfence.image.tarformat import Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ringfence.image.tarwrite import TarWriter

__all__ = ["PackOptions", "contents", "file_entry", "pack_tree"]

_CHUNK = 1 << 20
_KINDS = {
    stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHAR, stat.S_IFBLK: Kind.BLOCK, stat.S_IFIFO: Kind.FIFO,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """How a tree becomes a layer.

    Args:
        prefix: Where in the image it goes; empty is the root.
        overlay: It is an overlay's upper directory: whiteouts and opaque directories are turned
            into the standard's.
        latest_ns: Later times are set back to this one (nanoseconds since 1970).
        owner: All belong to this user and group; their own ones by default.
        exclude: Names, relative to the tree, that stay out along with what is below them.
    """

    prefix: bytes = b""
    overlay: bool = False
    latest_ns: int | None = None
    owner: tuple[int, int] | None = None
    exclude: Callable[[bytes], bool] | None = None


def pack_tree(root: Path, writer: TarWriter, options: PackOptions | None = None) -> int:
    """Write a tree's names as members; the root itself isn't one.

    Returns:
        The number of members.

    Raises:
        HostError: Something can't be read.
        FormatError: A file changed meanwhile.
    """
    options = options if options is not None else PackOptions()
    linked: dict[tuple[int, int], bytes] = {}
    count = 0
    hidden: bytes | None = None
    try:
        for name, found in walk_layer(root):
            if hidden is not None and name.startswith(hidden):
                continue
            hidden = None
            if options.exclude is not None and options.exclude(name):
                hidden = name + b"/"
                continue
            count += _pack(name, found, writer, options, linked)
    except OSError as error:
        if isinstance(error, HostError):
            raise
        msg = f"cannot pack {error.filename or root}: {error.strerror}"
        raise HostError(msg, errno=error.errno, path=str(root)) from error
    return count


def _pack(
    name: bytes,
    found: os.DirEntry[str],
    writer: TarWriter,
    options: PackOptions,
    linked: dict[tuple[int, int], bytes],
) -> int:
    status = found.stat(follow_symlinks=False)
    full = options.prefix + name
    folder, _, base = full.rpartition(b"/")
    above = folder + b"/" if folder else b""
    if options.overlay and is_whiteout(status):
        writer.add(_mark(above + b".wh." + base))
        return 1
    if stat.S_ISSOCK(status.st_mode):
        return 0  # a socket means nothing without its process
    key = (status.st_dev, status.st_ino)
    entry = file_entry(full, found.path, status, options)
    if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
        first = linked.setdefault(key, full)
        if first != full:
            entry.kind, entry.link, entry.size, entry.xattrs = Kind.HARD_LINK, first, 0, None
    if entry.kind == Kind.FILE and entry.size:
        writer.add(entry, contents(found.path))
    else:
        writer.add(entry)
    if options.overlay and entry.kind == Kind.DIRECTORY and is_opaque(Path(found.path)):
        writer.add(_mark(full + b"/.wh..wh..opq"))
        return 2
    return 1


def _mark(name: bytes) -> Entry:
    entry = Entry(name, Kind.FILE)
    entry.mode = 0o600
    return entry


def file_entry(
    name: bytes,
    path: str,
    status: os.stat_result,
    options: PackOptions,
) -> Entry:
    """The member for a file.

    Args:
        name: Its name in the archive.
        path: The file.
        status: Of the file itself, no link followed.
        options: Owner and time.
    """
    entry = Entry(name, _KINDS[stat.S_IFMT(status.st_mode)])
    entry.mode = stat.S_IMODE(status.st_mode)
    entry.uid, entry.gid = options.owner or (status.st_uid, status.st_gid)
    entry.mtime_ns = status.st_mtime_ns
    if options.latest_ns is not None:
        entry.mtime_ns = min(entry.mtime_ns, options.latest_ns)
    if entry.kind == Kind.FILE:
        entry.size = status.st_size
    elif entry.kind == Kind.SYMLINK:
        entry.link = os.fsencode(Path(path).readlink())
    elif entry.kind in (Kind.CHAR, Kind.BLOCK):
        entry.device = (os.major(status.st_rdev), os.minor(status.st_rdev))
    _attributes(entry, path, owned=options.owner is not None)
    return entry


def _attributes(entry: Entry, path: str, *, owned: bool) -> None:
    for name in os.listxattr(path, follow_symlinks=False):
        raw = os.fsencode(name)
        if (
            raw.startswith((b"trusted.", b"user.overlay.", b"system."))
            or name == "security.selinux"
        ):
            continue
        value = os.getxattr(path, name, follow_symlinks=False)
        if raw == OVERRIDE:
            if not owned:
                uid, gid, mode = value.split(b":")[:3]
                entry.uid, entry.gid, entry.mode = int(uid), int(gid), int(mode, 8) & 0o7777
            continue
        if entry.xattrs is None:
            entry.xattrs = {}
        entry.xattrs[raw] = value


def contents(path: str) -> Iterator[bytes]:
    """A file's bytes in pieces; a link isn't followed."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while data := os.read(fd, _CHUNK):
            yield data
    finally:
        os.close(fd)

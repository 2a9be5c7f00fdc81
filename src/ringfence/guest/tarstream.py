"""Trees of files as tar streams, both ways, with sparse files.

Source: GNU tar manual, "GNU tar and POSIX tar" (the old GNU sparse format, type ``S``).
"""

from __future__ import annotations

import io
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ringfence.errors import ConflictError, FormatError, HostError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["pack", "unpack"]

_BLOCK = 512
_READ_BYTES = 256 << 10
# Places for (offset, length) pairs in a sparse header, and in each block that goes on with them.
_FIRST_PAIRS = 4
_MORE_PAIRS = 21


def pack(source: Path, name: str) -> Iterator[bytes]:
    """A file or directory of the host as a tar stream.

    Sockets are left out. Owners are left to the receiver.

    Args:
        source: What to pack. Symbolic links in it are packed as links.
        name: What the stream calls it.

    Raises:
        NotFoundError: There is no ``source``.
        HostError: Something can't be read.
    """
    if not os.path.lexists(source):
        message = f"there is no {source} to copy"
        raise NotFoundError(message)
    try:
        yield from _pack(source, name)
        if source.is_dir() and not source.is_symlink():
            for folder, folders, names in os.walk(source):
                inner = Path(folder).relative_to(source)
                for entry in sorted((*folders, *names)):
                    yield from _pack(Path(folder) / entry, str(Path(name) / inner / entry))
    except OSError as error:
        message = f"cannot copy {error.filename or source}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(error.filename or source)) from error
    yield bytes(2 * _BLOCK)


def _pack(path: Path, name: str) -> Iterator[bytes]:
    if stat.S_ISSOCK(path.lstat().st_mode):
        return
    # An archive object is what makes a member's description of a file.
    with tarfile.TarFile(fileobj=io.BytesIO(), mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = archive.gettarinfo(path, name)
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    if not info.isreg():
        yield info.tobuf(tarfile.GNU_FORMAT)
        return
    with path.open("rb", buffering=0) as file:
        segments = _segments(file.fileno(), info.size)
        if segments == [(0, info.size)]:
            yield info.tobuf(tarfile.GNU_FORMAT)
        else:
            yield from _sparse_header(info, segments)
        sent = 0
        for start, length in segments:
            for piece in _read(file, start, length):
                sent += len(piece)
                yield piece
    yield bytes(-sent % _BLOCK)


def _read(file: io.FileIO, start: int, length: int) -> Iterator[bytes]:
    """Exactly ``length`` bytes: a file that shrinks meanwhile goes on as zeros."""
    file.seek(start)
    while length > 0:
        piece = file.read(min(length, _READ_BYTES)) or bytes(min(length, _READ_BYTES))
        length -= len(piece)
        yield piece


def _segments(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data: (offset, length) pairs."""
    segments: list[tuple[int, int]] = []
    at = 0
    try:
        while at < size:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            if start < size:
                segments.append((start, at - start))
    except OSError:
        # ENXIO: no data up to the end. Others: the file system doesn't say, so all is data.
        if not segments and at == 0 and not _is_hole(fd):
            return [(0, size)]
    return segments


def _is_hole(fd: int) -> bool:
    return os.fstat(fd).st_blocks == 0


def _sparse_header(info: tarfile.TarInfo, segments: list[tuple[int, int]]) -> Iterator[bytes]:
    size = info.size
    # The last pair says where the file ends.
    pairs = [*segments, (size, 0)]
    info.size = sum(length for _, length in segments)
    info.type = b"S"
    whole = info.tobuf(tarfile.GNU_FORMAT)
    # Long names come in members of their own before the header.
    yield whole[:-_BLOCK]
    header = bytearray(whole[-_BLOCK:])
    # The file's prefix field is where the pairs are; GNU headers have none.
    header[386 : 386 + 24 * _FIRST_PAIRS] = _pairs(pairs[:_FIRST_PAIRS], _FIRST_PAIRS)
    rest = pairs[_FIRST_PAIRS:]
    header[482] = 1 if rest else 0
    header[483:495] = _size_field(size)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    yield bytes(header)
    while rest:
        now, rest = rest[:_MORE_PAIRS], rest[_MORE_PAIRS:]
        block = _pairs(now, _MORE_PAIRS) + (b"\1" if rest else b"\0")
        yield block.ljust(_BLOCK, b"\0")


def _pairs(pairs: list[tuple[int, int]], places: int) -> bytes:
    fields = b"".join(_size_field(start) + _size_field(length) for start, length in pairs)
    return fields.ljust(24 * places, b"\0")


def _size_field(number: int) -> bytes:
    """A number in twelve bytes: octal, or binary when that is too short."""
    if number < 8**11:
        return b"%011o\0" % number
    return b"\x80" + number.to_bytes(11, "big")


class _Stream(io.RawIOBase):
    """Pieces as a file to read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override] # typeshed's Buffer is 3.12's
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def unpack(pieces: Iterator[bytes], name: str, target: Path) -> None:
    """Unpacks a stream that isn't trusted and that holds ``name`` alone.

    Args:
        pieces: The stream.
        name: The first part of all members' names; empty for any.
        target: What it becomes; a directory that is there gets it under its name.

    Raises:
        ConflictError: There is a directory of that name already.
        FormatError: It is no archive, or leads out of the copy.
        HostError: It can't be written.
    """
    final = target / name if name and target.is_dir() else target
    if final.is_dir():
        message = f"there is a directory {final} already"
        raise ConflictError(message, hint="remove it first or choose another name")
    try:
        # In a directory of its own, nothing that it names or links to is anything of ours.
        with tempfile.TemporaryDirectory(dir=final.absolute().parent, prefix=".copy-") as folder:
            _extract(pieces, Path(folder))
            made = list(Path(folder).iterdir())
            if len(made) != 1 or (name and made[0].name != name):
                message = f"the guest sent something else than {name}"
                raise FormatError(message)
            made[0].rename(final)
    except (tarfile.TarError, EOFError) as error:
        message = f"the guest's copy of {name} is refused: {error}"
        raise FormatError(message) from error
    except shutil.Error as error:
        message = f"cannot write {final}: {error}"
        raise HostError(message, path=str(final)) from error
    except OSError as error:
        message = f"cannot write {final}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(final)) from error


def _extract(pieces: Iterator[bytes], folder: Path) -> None:
    stream = io.BufferedReader(_Stream(pieces), _READ_BYTES)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            # Python 3.11 has filters from 3.11.4 on.
            archive.extractall(folder, members=_plain_members(archive))  # noqa: S202 - checked
    # The guest waits until all of its stream is taken.
    while stream.read(_READ_BYTES):
        pass


def _plain_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members that stay in the directory that they are unpacked in, owned by us."""
    links: set[str] = set()
    for member in archive:
        place = _within(member.name, member.name)
        folders = place.split("/")
        if any("/".join(folders[:depth]) in links for depth in range(1, len(folders))):
            _refuse(member.name, "lies behind a link")
        if member.issym():
            _check_link(member, place)
            links.add(place)
        elif member.islnk():
            _within(member.name, member.linkname)
        elif not (member.isreg() or member.isdir()):
            _refuse(member.name, "is a special file")
        member.mode = (member.mode & 0o755) | 0o600
        member.uid, member.gid, member.uname, member.gname = os.geteuid(), os.getegid(), "", ""
        yield member


def _check_link(member: tarfile.TarInfo, place: str) -> None:
    """A link goes up only at its beginning, where the directories are known not to be links."""
    steps = [step for step in member.linkname.split("/") if step not in {"", "."}]
    up = next((at for at, step in enumerate(steps) if step != ".."), len(steps))
    if member.linkname.startswith("/") or ".." in steps[up:]:
        _refuse(member.name, "leads out of the copy")
    _within(member.name, posixpath.join(posixpath.dirname(place), member.linkname))


def _within(name: str, path: str) -> str:
    """The path without its detours, if it leads nowhere else."""
    plain = posixpath.normpath(path)
    if path.startswith("/") or plain.split("/")[0] == "..":
        _refuse(name, "leads out of the copy")
    return plain


def _refuse(name: str, why: str) -> NoReturn:
    message = f"{name} {why}"
    raise tarfile.TarError(message)

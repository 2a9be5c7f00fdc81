"""Tar archives written: the same tree gives the same bytes.

pax headers are used where ustar can't hold a value. Members carry no more than asked: owner's
names are left out, times are whole seconds unless they aren't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ringfence.errors import FormatError
from ringfence.image.tarformat import BLOCK, Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Sink", "TarWriter"]

_MAX_OCTAL_11 = 0o77777777777
_MAX_OCTAL_7 = 0o7777777


class Sink(Protocol):
    """Where the bytes go."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Take all of `data`."""
        ...


class TarWriter:
    """Writes members one after the other.

    Args:
        sink: Where the bytes go.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def add(self, entry: Entry, data: Iterable[bytes | memoryview] = ()) -> None:
        """Write a member.

        Args:
            entry: Its header; directories need no slash at the end of their name.
            data: A file's contents, `entry.size` bytes in all.

        Raises:
            FormatError: More or fewer bytes came than the header says.
        """
        records: dict[bytes, bytes] = {}
        header = _header(entry, records)
        if records:
            body = _pax(records)
            extension = Entry(b"PaxHeaders/" + entry.name[-80:], b"x")
            extension.mode, extension.size = 0o644, len(body)
            self._write(_header(extension, {}))
            self._write(body + bytes(-len(body) % BLOCK))
        self._write(header)
        left = entry.size if entry.kind == Kind.FILE else 0
        for piece in data:
            left -= len(piece)
            if left < 0:
                break
            self._write(piece)
        if left:
            name = entry.name.decode(errors="replace")
            msg = f"{name} changed its length while it was being packed"
            raise FormatError(msg)
        if entry.kind == Kind.FILE and entry.size % BLOCK:
            self._write(bytes(-entry.size % BLOCK))

    def finish(self) -> None:
        """Write the end: two empty blocks."""
        self._write(bytes(2 * BLOCK))

    def _write(self, data: bytes | memoryview) -> None:
        self._sink.write(data)


def _pax(records: dict[bytes, bytes]) -> bytes:
    lines: list[bytes] = []
    for key, value in sorted(records.items()):
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest) + len(str(len(rest)))
        if len(str(length)) != len(str(len(rest))):
            length = len(rest) + len(str(length))
        lines.append(str(length).encode() + rest)
    return b"".join(lines)


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def _header(entry: Entry, records: dict[bytes, bytes]) -> bytes:
    """The header block; what doesn't fit goes to `records`."""
    name = entry.name
    if entry.kind == Kind.DIRECTORY and not name.endswith(b"/"):
        name += b"/"
    prefix = b""
    if len(name) > 100 or not name.isascii():
        cut = name.rfind(b"/", 0, 156)
        tail = name[cut + 1 :]
        if name.isascii() and cut > 0 and len(tail) <= 100 and tail:
            prefix, name = name[:cut], tail
        else:
            records[b"path"] = name
            name = name[:100]
    link = entry.link
    if len(link) > 100 or not link.isascii():
        records[b"linkpath"] = link
        link = link[:100]
    for key, value in (entry.xattrs or {}).items():
        records[b"SCHILY.xattr." + key] = value
    seconds, fraction = divmod(entry.mtime_ns, 1_000_000_000)
    if fraction or seconds < 0 or seconds > _MAX_OCTAL_11:
        sign = b"-" if entry.mtime_ns < 0 else b""
        whole, rest = divmod(abs(entry.mtime_ns), 1_000_000_000)
        text = b"%s%d.%09d" % (sign, whole, rest)
        records[b"mtime"] = text.rstrip(b"0").rstrip(b".")
        seconds = min(max(seconds, 0), _MAX_OCTAL_11)
    size = entry.size
    if size > _MAX_OCTAL_11:
        records[b"size"] = b"%d" % size
        size = 0
    uid, gid = entry.uid, entry.gid
    if uid > _MAX_OCTAL_7:
        records[b"uid"] = b"%d" % uid
        uid = 0
    if gid > _MAX_OCTAL_7:
        records[b"gid"] = b"%d" % gid
        gid = 0
    block = b"".join(
        (
            name.ljust(100, b"\0"),
            _octal(entry.mode, 8),
            _octal(uid, 8),
            _octal(gid, 8),
            _octal(size if entry.kind in (Kind.FILE, b"x") else 0, 12),
            _octal(seconds, 12),
            b" " * 8,
            entry.kind,
            link.ljust(100, b"\0"),
            b"ustar\x0000",
            bytes(64),
            _octal(entry.device[0], 8),
            _octal(entry.device[1], 8),
            prefix.ljust(155, b"\0"),
            bytes(12),
        ),
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]

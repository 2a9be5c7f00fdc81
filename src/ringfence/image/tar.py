"""Tar archives read as a stream: ustar, pax and GNU's extensions.

Written for speed: one pass, names as bytes, file contents handed on as views of the pieces that
came in. Python's own module takes several times as long per member.

Source: POSIX.1-2017 pax, "ustar Interchange Format"; the GNU tar manual, appendix D.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ringfence.image.tarformat import BLOCK, Entry, Kind, fail, number, records, time_ns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ringfence.image.limits import Limits

__all__ = ["TarReader"]

_XATTR = b"SCHILY.xattr."
_ZEROS = bytes(BLOCK)


class TarReader:
    """Reads members one after the other; each one's data before the next.

    Args:
        pieces: The archive in pieces of any length.
        limits: Bounds on headers.
    """

    def __init__(self, pieces: Iterable[bytes], limits: Limits) -> None:
        self._pieces = iter(pieces)
        self._limits = limits
        self._buffer = b""
        self._at = 0
        self._left = 0  # of the present member's data
        self._padding = 0
        self._global: dict[bytes, bytes] = {}

    # -- bytes ------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        """Exactly `count` bytes, or fewer at the end of the stream."""
        start = self._at
        stop = start + count
        if stop <= len(self._buffer):
            self._at = stop
            return self._buffer[start:stop]
        parts = [self._buffer[start:]]
        have = len(parts[0])
        while have < count:
            piece = next(self._pieces, b"")
            if not piece:
                self._buffer, self._at = b"", 0
                return b"".join(parts)
            parts.append(piece)
            have += len(piece)
        last = parts[-1]
        self._buffer = last
        self._at = len(last) - (have - count)
        parts[-1] = last[: self._at]
        return b"".join(parts)

    def _views(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes as views of what came in."""
        while count:
            have = len(self._buffer) - self._at
            if not have:
                self._buffer = next(self._pieces, b"")
                self._at = 0
                have = len(self._buffer)
                if not have:
                    fail("it ends within a file")
            step = min(have, count)
            start = self._at
            self._at += step
            count -= step
            yield memoryview(self._buffer)[start : start + step]

    def _skip(self, count: int) -> None:
        have = len(self._buffer) - self._at
        if count <= have:
            self._at += count
            return
        for _ in self._views(count):
            pass

    # -- data of the present member -------------------------------------------------------------

    def data(self) -> Iterator[memoryview]:
        """What is left of the present member's stored data."""
        left, self._left = self._left, 0
        yield from self._views(left)

    def read(self, limit: int) -> bytes:
        """All of the present member's data.

        Raises:
            FormatError: It is longer than `limit` bytes.
        """
        if self._left > limit:
            fail(f"a member is {self._left} bytes long, at most {limit} are read")
        return b"".join(self.data())

    def write_to(self, fd: int) -> None:
        """Write the present member's data to a file descriptor, at its position."""
        left = self._left
        start = self._at
        if left <= len(self._buffer) - start:
            self._left = 0
            self._at = start + left
            view = memoryview(self._buffer)[start : start + left]
            done = os.write(fd, view)
            while done < left:
                done += os.write(fd, view[done:])
            return
        for view in self.data():
            done = os.write(fd, view)
            while done < len(view):
                done += os.write(fd, view[done:])

    def write_sparse(self, fd: int, entry: Entry) -> None:
        """Write the present member's data where its map says, leaving holes."""
        for offset, length in entry.sparse or ():
            if length > self._left:
                fail(f"the map of the sparse file {entry.name!r} is longer than its data")
            self._left -= length
            at = offset
            for view in self._views(length):
                done = 0
                while done < len(view):
                    done += os.pwrite(fd, view[done:], at + done)
                at += len(view)

    # -- members --------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Entry]:
        """The members; what the caller leaves of one's data is skipped.

        Raises:
            FormatError: The archive is malformed.
        """
        local: dict[bytes, bytes] = {}
        while True:
            self._skip(self._left)
            # Some writers leave out the last member's padding, and the end with it.
            header = self._take(self._padding + BLOCK)[self._padding :]
            self._left = self._padding = 0
            if len(header) < BLOCK or header == _ZEROS:
                if 0 < len(header) < BLOCK:
                    fail("it ends within a header")
                break
            kind = header[156:157]
            size = number(header[124:136])
            if size < 0:
                fail("a length is negative")
            self._checksum(header)
            if kind in b"xgLK":
                self._extension(kind, size, local)
                continue
            entry = self._entry(header, kind, size, local)
            local = {}
            if entry is not None:
                yield entry
        for _ in self._pieces:  # to the end, for the digest
            pass

    @staticmethod
    def _checksum(header: bytes) -> None:
        total = sum(header) - sum(header[148:156]) + 256
        if number(header[148:156]) != total:
            fail("a header's checksum is wrong")

    def _extension(self, kind: bytes, size: int, local: dict[bytes, bytes]) -> None:
        """An extended header (pax x and g, GNU L and K)."""
        if size > self._limits.header_bytes:
            fail(f"an extended header is {size} bytes long")
        data = self._take(size)
        if len(data) < size:
            fail("it ends within an extended header")
        self._skip(-size % BLOCK)
        if kind == b"L":
            local[b"path"] = data.split(b"\0", 1)[0]
        elif kind == b"K":
            local[b"linkpath"] = data.split(b"\0", 1)[0]
        else:
            (self._global if kind == b"g" else local).update(records(data))

    def _entry(
        self,
        header: bytes,
        kind: bytes,
        size: int,
        local: dict[bytes, bytes],
    ) -> Entry | None:
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        old_sparse = kind == b"S"
        if kind in b"\x007S" or kind not in Kind.ALL:
            # 7 is contiguous; unknown kinds are files by the standard's word.
            kind = Kind.FILE
        if kind == Kind.FILE and name.endswith(b"/"):
            kind = Kind.DIRECTORY
        entry = Entry(name, kind)
        entry.mode = number(header[100:108]) & 0o7777
        entry.uid = number(header[108:116])
        entry.gid = number(header[116:124])
        entry.mtime_ns = number(header[136:148]) * 1_000_000_000
        entry.link = header[157:257].split(b"\0", 1)[0]
        if kind in (Kind.CHAR, Kind.BLOCK):
            entry.device = (number(header[329:337]), number(header[337:345]))
        if self._global or local:
            size = self._apply({**self._global, **local} if self._global else local, entry, size)
        if kind != Kind.FILE:
            # Directories and links have no data, whatever their length says (POSIX).
            size = 0
        entry.size = entry.stored = self._left = size
        self._padding = -size % BLOCK
        if old_sparse:
            self._old_sparse(header, entry)
        elif local and any(key.startswith(b"GNU.sparse.") for key in local):
            self._pax_sparse(local, entry)
        return entry

    @staticmethod
    def _apply(found: dict[bytes, bytes], entry: Entry, size: int) -> int:
        for key, value in found.items():
            if key == b"path":
                entry.name = value
            elif key == b"linkpath":
                entry.link = value
            elif key == b"mtime":
                entry.mtime_ns = time_ns(value)
            elif key in (b"size", b"uid", b"gid"):
                if not value.isdigit() or len(value) > 19:
                    fail(f"{value!r} is not a number")
                if key == b"size":
                    size = int(value)
                elif key == b"uid":
                    entry.uid = int(value)
                else:
                    entry.gid = int(value)
            elif key.startswith(_XATTR):
                if entry.xattrs is None:
                    entry.xattrs = {}
                entry.xattrs[key[len(_XATTR) :]] = value
        return size

    # -- sparse files ---------------------------------------------------------------------------

    def _old_sparse(self, header: bytes, entry: Entry) -> None:
        """GNU's type S: four extents in the header, 21 in each block that follows."""
        extents: list[tuple[int, int]] = []
        block, at, count, more = header, 386, 4, header[482]
        real = number(header[483:495])
        while True:
            for index in range(count):
                offset = block[at + 24 * index : at + 24 * index + 12]
                length = block[at + 24 * index + 12 : at + 24 * index + 24]
                if offset.strip(b"\0 "):
                    extents.append((number(offset), number(length)))
            if not more:
                break
            if len(extents) * 24 > self._limits.header_bytes:
                fail("the map of a sparse file is too long")
            block, at, count = self._take(BLOCK), 0, 21
            if len(block) < BLOCK:
                fail("it ends within the map of a sparse file")
            more = block[504]
        self._set_sparse(entry, extents, real)

    def _pax_sparse(self, found: dict[bytes, bytes], entry: Entry) -> None:
        """GNU's pax forms 0.1 (map in the header) and 1.0 (map before the data)."""
        entry.name = found.get(b"GNU.sparse.name", entry.name)
        size = found.get(b"GNU.sparse.realsize") or found.get(b"GNU.sparse.size") or b""
        numbers: list[int] = []
        if found.get(b"GNU.sparse.major") == b"1":
            count = self._map_number()
            if not 0 <= count * 2 * 4 <= self._limits.header_bytes:
                fail("the map of a sparse file is too long")
            numbers = [self._map_number() for _ in range(2 * count)]
            consumed = entry.stored - self._left
            self._left -= -consumed % BLOCK
            self._skip(-consumed % BLOCK)
        elif b"GNU.sparse.map" in found:
            parts = found[b"GNU.sparse.map"].split(b",")
            if not all(part.isdigit() for part in parts):
                fail("the map of a sparse file is malformed")
            numbers = [int(part) for part in parts]
        else:
            fail("a sparse file of GNU's form 0.0, which tar itself has deprecated")
        if not size.isdigit():
            fail("a sparse file has no length")
        self._set_sparse(entry, list(zip(numbers[::2], numbers[1::2], strict=False)), int(size))

    def _map_number(self) -> int:
        digits = b""
        while self._left and len(digits) < 20:
            byte = self._take(1)
            self._left -= 1
            if byte == b"\n":
                break
            digits += byte
        if not digits.isdigit():
            fail("the map of a sparse file is malformed")
        return int(digits)

    def _set_sparse(self, entry: Entry, extents: list[tuple[int, int]], real: int) -> None:
        end = 0
        for offset, length in extents:
            if offset < end or length < 0:
                fail(f"the map of the sparse file {entry.name!r} overlaps itself")
            end = offset + length
        if end > real or real > self._limits.layer_bytes:
            fail(f"the sparse file {entry.name!r} is {real} bytes long")
        entry.size = real
        entry.sparse = [extent for extent in extents if extent[1]]

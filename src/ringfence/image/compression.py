"""Compressed streams: known by their first bytes, decompressed in a thread, hashed and bounded.

zlib, zstd and the hashes release the interpreter's lock, so that decompression and hashing run
beside whoever uses the bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
import zlib
from typing import IO, TYPE_CHECKING, Protocol, Self, cast

from ringfence.errors import FormatError, UnsupportedError
from ringfence.image.references import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from ringfence.image.limits import Limits

__all__ = ["Decompressed", "Peekable", "compression_of", "decompress"]

_INPUT = 1 << 18
_OUTPUT = 1 << 20
_MAX_WINDOW = 1 << 27
"""zstd's window: 128 MiB, what its own command accepts by default."""

GZIP = "gzip"
ZSTD = "zstd"
XZ = "xz"
BZIP2 = "bzip2"
NONE = ""


def compression_of(start: bytes) -> str:
    """Which compression a stream has, by its first bytes: gzip, zstd, xz, bzip2 or none (empty)."""
    if start.startswith(b"\x1f\x8b"):
        return GZIP
    # A skippable frame may come first: 0x184D2A50 to 0x184D2A5F (RFC 8878 §3.1.2).
    if start.startswith(b"\x28\xb5\x2f\xfd") or (
        start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50
    ):
        return ZSTD
    if start.startswith(b"\xfd7zXZ\x00"):
        return XZ
    if start.startswith(b"BZh"):
        return BZIP2
    return NONE


class Source(Protocol):
    """What is asked of a compressed file."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...

    def tell(self) -> int:
        """Bytes read so far."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go back to where the compression was asked for."""
        ...


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class Peekable:
    """A file, perhaps a pipe, whose first bytes can be looked at.

    Args:
        file: The file.
    """

    def __init__(self, file: _Readable) -> None:
        self._file = file
        self._start = b""
        self._at = 0

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; none at the end."""
        if self._start:
            start, self._start = self._start[:size], self._start[size:]
            self._at += len(start)
            return start
        data = self._file.read(size)
        self._at += len(data)
        return data

    def peek(self) -> bytes:
        """The first 8 bytes, which stay to be read."""
        while len(self._start) < 8:
            more = self._file.read(8 - len(self._start))
            if not more:
                break
            self._start += more
        return self._start

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:  # noqa: ARG002 - a pipe can't
        """Refused: a pipe has no way back."""
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))


class _Inflater(Protocol):
    """What lzma and bz2 offer alike."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _gunzip(file: Source) -> Iterator[bytes]:
    inflater = zlib.decompressobj(31)
    data = file.read(_INPUT)
    while data:
        out = inflater.decompress(data, _OUTPUT)
        if out:
            yield out
        if inflater.eof:
            data = inflater.unused_data or file.read(_INPUT)
            if not data.startswith(b"\x1f"):
                return  # padding after the last member
            inflater = zlib.decompressobj(31)
        else:
            data = inflater.unconsumed_tail or file.read(_INPUT)
    if not inflater.eof:
        raise EOFError


def _unzstd(file: Source) -> Iterator[bytes]:
    import zstandard  # noqa: PLC0415 - most images don't need it

    context = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with context.stream_reader(
        cast("IO[bytes]", file),
        read_size=_INPUT,
        read_across_frames=True,
    ) as reader:
        while out := reader.read(_OUTPUT):
            yield out


def _inflate(file: Source, inflater: _Inflater) -> Iterator[bytes]:
    while not inflater.eof:
        data = file.read(_INPUT) if inflater.needs_input else b""
        if inflater.needs_input and not data:
            raise EOFError
        out = inflater.decompress(data, _OUTPUT)
        if out:
            yield out


def decompress(file: Source, kind: str) -> Iterator[bytes]:
    """The uncompressed bytes in pieces of at most 1 MiB.

    Args:
        file: Read from its present position.
        kind: What `compression_of` says.

    Raises:
        FormatError: Corrupt or cut short.
        UnsupportedError: zstd, and the package ``zstandard`` is missing.
    """
    try:
        if kind == GZIP:
            yield from _gunzip(file)
        elif kind == ZSTD:
            yield from _unzstd(file)
        elif kind == XZ:
            import lzma  # noqa: PLC0415 - only for tarballs that users bring

            yield from _inflate(file, lzma.LZMADecompressor(memlimit=1 << 30))
        elif kind == BZIP2:
            import bz2  # noqa: PLC0415 - only for tarballs that users bring

            yield from _inflate(file, bz2.BZ2Decompressor())
        else:
            while data := file.read(_OUTPUT):
                yield data
    except EOFError as error:
        msg = f"the {kind} stream ends too early"
        raise FormatError(msg) from error
    except ImportError as error:
        msg = "the layer is compressed with zstd, and the Python package zstandard is missing"
        raise UnsupportedError(msg, hint="pip install zstandard") from error
    except Exception as error:
        # zlib.error, lzma.LZMAError, ZstdError, OSError of bz2: all mean the same here.
        if isinstance(error, (FormatError, MemoryError)) or not kind:
            raise
        msg = f"the {kind} stream is corrupt: {error}"
        raise FormatError(msg) from error


class Decompressed:
    """The uncompressed bytes of a stream, made by a thread of its own.

    Iterate over it for the pieces; afterwards `digest` and `size` are those of all of them.

    Args:
        file: The compressed bytes, read to their end; the caller closes it after this.
        kind: Its compression; by default the file is asked, which must be seekable then.
        limits: What it may come to.
    """

    def __init__(self, file: Source, limits: Limits, kind: str | None = None) -> None:
        self._file = file
        self._limits = limits
        self._pieces: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=8)
        self._hash = hashlib.sha256()
        self._stop = threading.Event()
        self.size = 0
        if kind is None:
            start = file.read(8)
            file.seek(-len(start), 1)
            kind = compression_of(start)
        self.kind = kind
        self._thread = threading.Thread(target=self._produce, name="decompress", daemon=True)
        self._thread.start()

    @property
    def digest(self) -> Digest:
        """The digest of the uncompressed bytes handed out so far."""
        return Digest("sha256", self._hash.hexdigest())

    def _produce(self) -> None:
        end: BaseException | None = None
        try:
            for piece in decompress(self._file, self.kind):
                self.size += len(piece)
                self._check()
                self._hash.update(piece)
                self._pieces.put(piece)
                if self._stop.is_set():
                    return
        except BaseException as error:
            end = error
        self._pieces.put(end)

    def _check(self) -> None:
        if self.size > self._limits.layer_bytes:
            msg = f"the layer is longer than {self._limits.layer_bytes} bytes uncompressed"
            raise FormatError(msg, hint="raise Limits.layer_bytes if the image is to be trusted")
        if self.kind and self.size > self._limits.ratio_from_bytes:
            ratio = self.size // max(self._file.tell(), 1)
            if ratio > self._limits.ratio:
                msg = f"the layer unpacks to {ratio} times its length: a decompression bomb"
                raise FormatError(msg, hint="raise Limits.ratio if the image is to be trusted")

    def __iter__(self) -> Iterator[bytes]:
        """The pieces in order."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._pieces.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread."""
        self.close()

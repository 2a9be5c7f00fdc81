"""What a machine's command wrote while nobody looked: kept with a bound, told by stream.

A log is two files of frames, the older half and the newer: stream (u8), time in nanoseconds since
the epoch (u64), length (u32), all little-endian, then the bytes.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Chunk", "LogWriter", "follow", "read"]

_HEAD = struct.Struct("<BQI")
_HALF_BYTES = 8 << 20
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What was written at once.

    Args:
        stream: 1 for standard output, 2 for standard error.
        time_ns: When, since the epoch.
        data: The bytes.
    """

    stream: int
    time_ns: int
    data: bytes


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


class LogWriter:
    """Appends to a log, from any thread. A full disk costs the log, never the command.

    Args:
        path: The newer half's file.
        half_bytes: When the newer half becomes the older.
    """

    def __init__(self, path: Path, *, half_bytes: int = _HALF_BYTES) -> None:
        self._path = path
        self._half_bytes = half_bytes
        self._lock = threading.Lock()
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    def write(self, stream: int, data: bytes) -> None:
        """Appends what was written to a stream."""
        frame = _HEAD.pack(stream, time.time_ns(), len(data)) + data
        with self._lock, suppress(OSError):
            if self._size and self._size + len(frame) > self._half_bytes:
                self._file.close()
                self._path.rename(_older(self._path))
                self._file = self._path.open("ab", buffering=0)
                self._size = 0
            written = self._file.write(frame)
            if written is not None and written < len(frame):
                # Half a frame would spoil what follows.
                os.ftruncate(self._file.fileno(), self._size)
                return
            self._size += len(frame)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()


def _chunks(data: bytes) -> tuple[list[Chunk], int]:
    """The whole frames of ``data``, and how many bytes they are."""
    found, position = [], 0
    while position + _HEAD.size <= len(data):
        stream, time_ns, length = _HEAD.unpack_from(data, position)
        end = position + _HEAD.size + length
        if end > len(data):
            break
        body = data[position + _HEAD.size : end]
        found.append(Chunk(stream=stream, time_ns=time_ns, data=body))
        position = end
    return found, position


def read(path: Path) -> list[Chunk]:
    """All that is kept, oldest first."""
    return _whole(_older(path)) + _whole(path)


def _whole(path: Path) -> list[Chunk]:
    with suppress(FileNotFoundError):
        return _chunks(path.read_bytes())[0]
    return []


def follow(path: Path, ended: Callable[[], bool]) -> Iterator[Chunk]:
    """All that is kept and all that comes, until ``ended()`` and nothing more is there."""
    # The newer half first: should it become the older one meanwhile, it is the same file.
    file = path.open("rb", buffering=0) if path.exists() else None
    if file is None or not _is_same(file.fileno(), _older(path)):
        yield from _whole(_older(path))
    pending = b""
    try:
        while True:
            over = ended()
            if file is None and path.exists():
                file = path.open("rb", buffering=0)
            if file is not None:
                pending += file.read()
                chunks, used = _chunks(pending)
                pending = pending[used:]
                yield from chunks
                if path.exists() and not _is_same(file.fileno(), path):
                    file.close()
                    file, pending = None, b""
                    continue
            if over:
                return
            time.sleep(_POLL_S)
    finally:
        if file is not None:
            file.close()


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False

"""The guest's files: read, written, listed, moved, removed, and copied as trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.errors import AgentError, GuestError
from ringfence.guest import tarstream
from ringfence.guest.frames import Connection, Json, Kind, failure, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

__all__ = ["FileInfo", "Files"]

_CALL_TIMEOUT_S = 60.0
_DATA_BYTES = 64 << 10
# More than any directory that is listed in earnest: the guest is not trusted to end.
_MAX_ENTRIES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What a guest says of a file.

    Args:
        name: Its last part.
        type: ``file``, ``directory``, ``symlink``, ``fifo``, ``socket``, ``block``, ``char``.
        size: Bytes.
        mode: Permission bits.
        uid: Owner.
        gid: Group.
        mtime_ns: Last change, since 1970.
        target: Of a symbolic link.
    """

    name: str
    type: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str = ""


class Files:
    """The guest's files. Paths are absolute paths in the guest.

    Every method raises GuestError when the guest refuses, ConfigError for a path that can't be one,
    and AgentError when the guest is gone.

    Args:
        connect: Makes a connection to the agent.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect

    def read(self, path: str) -> bytes:
        """The whole content."""
        return b"".join(self.read_chunks(path))

    def read_chunks(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> Iterator[bytes]:
        """The content in pieces.

        Args:
            path: The file.
            offset: The first byte.
            length: At most that many bytes.
        """
        yield from self._receive("read", {"path": path, "offset": offset, "length": length})

    def write(
        self,
        path: str,
        data: bytes | bytearray | memoryview | Iterable[bytes],
        *,
        mode: int = 0o644,
        append: bool = False,
        user: str = "",
    ) -> int:
        """Writes a file, made if it is missing, and returns how many bytes.

        Args:
            path: The file; its directory must be there.
            data: All of it, or pieces.
            mode: Permissions of a new file.
            append: At its end, rather than in place of what is there.
            user: Its owner, as in :class:`~ringfence.guest.spec.ExecSpec`; empty is root.
        """
        fields: Json = {"path": path, "mode": mode, "append": append, "user": user}
        pieces = (bytes(data),) if isinstance(data, bytes | bytearray | memoryview) else data
        return _number(self._send("write", fields, pieces), "size")

    def list(self, path: str) -> list[FileInfo]:
        """A directory's entries, by name."""
        found: list[FileInfo] = []
        skip = 0
        while skip < _MAX_ENTRIES:
            answer = self._call("list", {"path": path, "skip": skip})
            entries = answer.get("entries")
            if not isinstance(entries, list):
                break
            found += [_info(entry) for entry in entries]
            # An entry may go while it is looked at, so what came doesn't say how far it was.
            skip += _number(answer, "count")
            if answer.get("more") is not True:
                return found
        message = f"the guest's list of {path} doesn't end"
        raise AgentError(message)

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """What is at a path; through a symbolic link unless ``follow`` is False."""
        return _info(self._call("stat", {"path": path, "follow": follow}))

    def exists(self, path: str) -> bool:
        """Whether anything is at a path."""
        try:
            self.stat(path, follow=False)
        except GuestError as error:
            if isinstance(error, AgentError):
                raise
            return False
        return True

    def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Makes a directory; with ``parents`` those above it too, and it may be there already."""
        self._call("mkdir", {"path": path, "mode": mode, "parents": parents})

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file or directory, with all that is in it if ``recursive``."""
        self._call("remove", {"path": path, "recursive": recursive})

    def rename(self, source: str, target: str) -> None:
        """Renames within a file system."""
        self._call("rename", {"source": source, "target": target})

    def tar_in(self, path: str, chunks: Iterable[bytes], *, owner: bool = False) -> None:
        """Unpacks a tar stream into a directory, which is made if it is missing.

        Args:
            path: The directory.
            chunks: The stream, uncompressed.
            owner: Keep the archive's owners; else all belongs to root.
        """
        self._send("tar_in", {"path": path, "owner": owner}, chunks)

    def tar_out(self, path: str) -> Iterator[bytes]:
        """A file or directory as a tar stream; its members' names begin with its own."""
        yield from self._receive("tar_out", {"path": path})

    def copy_in(self, source: Path, target: str) -> None:
        """Copies a file or directory of the host to the guest.

        Args:
            source: On the host. Links are copied as links.
            target: The copy's path in the guest; into a directory that is there already.

        Raises:
            NotFoundError: There is no ``source``.
        """
        folder, _, name = target.rstrip("/").rpartition("/")
        if target.endswith("/") or self._is_directory(target):
            folder, name = target, source.absolute().name
        self.tar_in(folder or "/", tarstream.pack(source, name))

    def copy_out(self, source: str, target: Path) -> None:
        """Copies a file or directory of the guest to the host.

        What the guest sends can't reach anything outside of the copy: names and links that lead
        out of it, devices and set-ID bits are refused or dropped.

        Args:
            source: In the guest.
            target: The copy's path on the host; into a directory that is there already.

        Raises:
            ConflictError: There is a directory of that name already.
            FormatError: The guest's stream is no archive, or leads out of the copy.
        """
        name = source.rstrip("/").rpartition("/")[2]
        tarstream.unpack(self.tar_out(source), name, target)

    def _is_directory(self, path: str) -> bool:
        try:
            return self.stat(path).type == "directory"
        except GuestError as error:
            if isinstance(error, AgentError):
                raise
            return False

    def _call(self, operation: str, fields: Json) -> Json:
        return call(self._connect, operation, fields)

    def _receive(self, operation: str, fields: Json) -> Iterator[bytes]:
        connection = self._connect()
        try:
            connection.send_json(Kind.REQUEST, {"op": operation, **fields})
            _expect(connection, Kind.ANSWER)
            while data := _expect(connection, Kind.DATA):
                yield data
        finally:
            connection.close()

    def _send(self, operation: str, fields: Json, pieces: Iterable[bytes]) -> Json:
        connection = self._connect()
        try:
            connection.send_json(Kind.REQUEST, {"op": operation, **fields})
            _expect(connection, Kind.ANSWER)
            for piece in pieces:
                view = memoryview(piece)
                for start in range(0, len(view), _DATA_BYTES):
                    connection.send(Kind.DATA, view[start : start + _DATA_BYTES])
            connection.send(Kind.DATA)
            return parse(_expect(connection, Kind.ANSWER, timeout_s=None))
        finally:
            connection.close()


def call(connect: Callable[[], Connection], operation: str, fields: Json) -> Json:
    """One request and its answer.

    Raises:
        GuestError: The guest refused.
        AgentError: It is gone.
        GuestTimeout: It doesn't answer.
    """
    connection = connect()
    try:
        connection.send_json(Kind.REQUEST, {"op": operation, **fields})
        return parse(_expect(connection, Kind.ANSWER))
    finally:
        connection.close()


def _expect(connection: Connection, kind: Kind, timeout_s: float | None = _CALL_TIMEOUT_S) -> bytes:
    frame = connection.receive(timeout_s)
    if frame.kind is Kind.ERROR:
        raise failure(frame.payload)
    if frame.kind is not kind:
        message = f"the guest's agent broke the protocol: {frame.kind.name} for {kind.name}"
        raise AgentError(message)
    return frame.payload


def _number(value: Json, name: str) -> int:
    number = value.get(name)
    if not isinstance(number, int):
        message = f"the guest's agent broke the protocol: no number {name}"
        raise AgentError(message)
    return number


def _info(value: object) -> FileInfo:
    if not isinstance(value, dict):
        message = "the guest's agent broke the protocol: no file"
        raise AgentError(message)
    return FileInfo(
        name=str(value.get("name", "")),
        type=str(value.get("type", "")),
        size=_number(value, "size"),
        mode=_number(value, "mode"),
        uid=_number(value, "uid"),
        gid=_number(value, "gid"),
        mtime_ns=_number(value, "mtime_ns"),
        target=str(value.get("target", "")),
    )

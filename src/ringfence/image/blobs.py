"""Blobs on disk, named by their digest.

A blob is written beside its place, hashed on the way, and renamed into it when it is whole and
its digest is right: a file under ``blobs/`` is always a whole one, whenever a writer is killed.
Whoever writes holds the store's lock as a sharer; `tmp/` belongs to nobody once nobody does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from typing import TYPE_CHECKING, BinaryIO, Self

from ringfence.errors import FormatError, HostError, NotFoundError
from ringfence.image.jsonio import MAX_DOCUMENT_BYTES
from ringfence.image.locking import locked
from ringfence.image.references import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from ringfence.image.manifests import Descriptor

__all__ = ["BlobStore", "BlobWriter"]

_CHUNK = 1 << 20


class BlobWriter:
    """Takes one blob; nothing of it is seen before `commit`."""

    def __init__(
        self,
        store: BlobStore,
        path: Path,
        *,
        algorithm: str = "sha256",
        resume: bool = False,
    ) -> None:
        self._store = store
        self._path = path
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm)
        self._file: BinaryIO | None = path.open("ab" if resume else "xb", buffering=0)
        self.size = 0
        if resume:
            with path.open("rb") as done:
                while chunk := done.read(_CHUNK):
                    self._hash.update(chunk)
                    self.size += len(chunk)

    def write(self, data: bytes | memoryview) -> int:
        """Append.

        Raises:
            HostError: The disk is full, or it is closed.
        """
        if self._file is None:
            msg = "the blob is already closed"
            raise HostError(msg, path=str(self._path))
        self._hash.update(data)
        view = memoryview(data)
        while view:
            try:
                view = view[self._file.write(view) :]
            except OSError as error:
                msg = f"cannot write {self._path}: {error.strerror}"
                raise HostError(msg, errno=error.errno, path=str(self._path)) from error
        self.size += len(data)
        return len(data)

    def restart(self) -> None:
        """Forget what was written."""
        if self._file is not None:
            self._file.truncate(0)
        self._hash = hashlib.new(self._algorithm)
        self.size = 0

    @property
    def digest(self) -> Digest:
        """The digest of what was written so far."""
        return Digest(self._algorithm, self._hash.hexdigest())

    def commit(self, expected: Descriptor | None = None) -> Digest:
        """Put it in its place.

        Args:
            expected: What it must turn out to be.

        Raises:
            FormatError: It is something else; it is thrown away.
        """
        if self._file is None:
            msg = "the blob is already closed"
            raise HostError(msg, path=str(self._path))
        if expected is not None and (self.size, self.digest) != (expected.size, expected.digest):
            self.discard()
            msg = (
                f"blob {expected.digest} ({expected.size} bytes) arrived as {self.digest} "
                f"({self.size} bytes)"
            )
            raise FormatError(msg, hint="the sender or the way to it is at fault; try again")
        os.fdatasync(self._file.fileno())
        self._file.close()
        self._file = None
        target = self._store.path(self.digest)
        self._path.chmod(0o444)
        target.parent.mkdir(exist_ok=True)
        self._path.rename(target)
        return self.digest

    def close(self) -> None:
        """Close the file; a resumable part stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Close it and throw away what was written, unless it was committed."""
        if self._file is not None:
            self.close()
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Throw it away unless it was committed."""
        self.discard()


class BlobStore:
    """The blobs under one root.

    Args:
        root: The store's directory; ``blobs/sha256`` is laid out as in an OCI layout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._partial = root / "partial"
        self._tmp = root / "tmp"

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        return self.root / "blobs" / digest.algorithm / digest.hex

    def has(self, digest: Digest) -> bool:
        """Whether it is here, whole."""
        return self.path(digest).is_file()

    def size(self, digest: Digest) -> int:
        """Its length in bytes.

        Raises:
            NotFoundError: It isn't here.
        """
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError as error:
            raise self._missing(digest) from error

    def open(self, digest: Digest) -> BinaryIO:
        """Open it for reading, unbuffered.

        Raises:
            NotFoundError: It isn't here.
        """
        try:
            return self.path(digest).open("rb", buffering=0)
        except FileNotFoundError as error:
            raise self._missing(digest) from error

    def read(self, digest: Digest) -> bytes:
        """A document, at most ``MAX_DOCUMENT_BYTES`` long, its digest checked.

        Raises:
            NotFoundError: It isn't here.
            FormatError: Too long, or its digest is wrong (the disk or somebody changed it).
        """
        with self.open(digest) as blob:
            data = blob.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            msg = f"blob {digest} is too long for a document"
            raise FormatError(msg)
        if Digest.of(data, digest.algorithm) != digest:
            msg = f"blob {self.path(digest)} no longer has its digest"
            raise FormatError(msg, hint="remove the file and pull the image again")
        return data

    def put(self, data: bytes) -> Digest:
        """Store a document."""
        digest = Digest.of(data)
        if self.has(digest):
            return digest
        with self.writer() as writer:
            writer.write(data)
            return writer.commit()

    def writer(self) -> BlobWriter:
        """Take a blob of any digest."""
        return BlobWriter(self, self.temporary())

    @contextlib.contextmanager
    def resume(self, wanted: Descriptor) -> Iterator[BlobWriter | None]:
        """Take the blob `wanted`, going on where an earlier attempt ended.

        One process at a time: others wait, and then find it done.

        Yields:
            The writer, with `size` bytes already there; None if the blob is here.
        """
        if self.has(wanted.digest):
            yield None
            return
        stem = f"{wanted.digest.algorithm}-{wanted.digest.hex}"
        with locked(self._partial / f"{stem}.lock", shared=False):
            if self.has(wanted.digest):
                yield None
                return
            path = self._partial / stem
            path.touch(mode=0o600)
            writer = BlobWriter(self, path, algorithm=wanted.digest.algorithm, resume=True)
            try:
                if writer.size > wanted.size:
                    writer.restart()
                yield writer
            finally:
                writer.close()

    def temporary(self) -> Path:
        """A path for something that isn't done."""
        return self._tmp / secrets.token_hex(12)

    def digests(self) -> Iterator[Digest]:
        """All that are here."""
        for folder in sorted((self.root / "blobs").iterdir()):
            for path in folder.iterdir():
                yield Digest(folder.name, path.name)

    def _missing(self, digest: Digest) -> NotFoundError:
        return NotFoundError(f"blob {digest} is not in the store", hint="pull the image again")

"""Layers made: a tar that is hashed, compressed and stored as it is written.

The compressor works on pieces of a fixed length in several threads, and joins them as members of
one gzip file (RFC 1952 §2.2): the same tar gives the same blob, on any number of processors.
"""

from __future__ import annotations

import collections
import hashlib
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ringfence.image.manifests import Descriptor, MediaType
from ringfence.image.references import Digest
from ringfence.image.tarwrite import TarWriter

if TYPE_CHECKING:
    from types import TracebackType

    from ringfence.image.store import Store

__all__ = ["LayerWriter", "MadeLayer"]

_PIECE = 1 << 20
_LEVEL = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeLayer:
    """A layer in the store.

    Args:
        blob: The compressed tar.
        diff_id: The digest of the tar.
        empty: Whether it has no members.
        created: When a build made it, as RFC 3339 has it; empty where that isn't known.
    """

    blob: Descriptor
    diff_id: Digest
    empty: bool = False
    created: str = ""


class LayerWriter:
    """Takes a layer's members through `tar`; a context manager, used within `Store.using`.

    Args:
        store: Where the layer goes.
    """

    def __init__(self, store: Store) -> None:
        self._blob = store.blobs.writer()
        self._hash = hashlib.sha256()
        self._parts: list[bytes | memoryview] = []
        self._held = 0
        self._taken = 0
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "gzip")
        self._waiting: collections.deque[Future[bytes]] = collections.deque()
        self.tar = TarWriter(self)

    def write(self, data: bytes | memoryview, /) -> int:
        """Take the next bytes of the tar."""
        # A view may be of a buffer that changes.
        data = bytes(data)
        self._parts.append(data)
        self._held += len(data)
        self._taken += len(data)
        if self._held >= _PIECE:
            self._cut(last=False)
        return len(data)

    def _cut(self, *, last: bool) -> None:
        held = b"".join(self._parts)
        at = 0
        while len(held) - at >= _PIECE or (last and at < len(held)):
            piece = held[at : at + _PIECE]
            at += len(piece)
            self._hash.update(piece)
            self._waiting.append(self._threads.submit(_gzip, piece))
            while len(self._waiting) > 16:
                self._blob.write(self._waiting.popleft().result())
        self._parts = [held[at:]]
        self._held = len(held) - at

    def finish(self) -> MadeLayer:
        """End the tar and put the layer into the store."""
        empty = self._taken == 0
        self.tar.finish()
        self._cut(last=True)
        while self._waiting:
            self._blob.write(self._waiting.popleft().result())
        size = self._blob.size
        digest = self._blob.commit()
        blob = Descriptor(media_type=MediaType.OCI_LAYER_GZIP, digest=digest, size=size)
        return MadeLayer(
            blob=blob,
            diff_id=Digest("sha256", self._hash.hexdigest()),
            empty=empty,
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Throw away what isn't finished."""
        self._threads.shutdown(cancel_futures=True)
        self._blob.discard()


def _gzip(piece: bytes) -> bytes:
    squeezer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    return squeezer.compress(piece) + squeezer.flush()

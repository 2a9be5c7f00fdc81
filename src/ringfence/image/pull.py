"""Images fetched from registries: in parallel, resumed where they broke off, verified."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ringfence.errors import FormatError, HostError
from ringfence.image.manifests import Descriptor, Index, Manifest, MediaType, parse_document
from ringfence.image.platforms import Platform
from ringfence.image.references import Digest, Reference
from ringfence.image.registry import Registry
from ringfence.image.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.image.blobs import BlobWriter
    from ringfence.image.store import Image, Store

__all__ = ["pull"]

_PARALLEL = 4
_CHUNK = 1 << 18
_ATTEMPTS = 5
_MAX_WAIT_S = 8.0


def pull(
    store: Store,
    name: str,
    *,
    platform: Platform | None,
    plain_http: bool,
    progress: Callable[[Progress], None] | None,
) -> Image:
    """What `Store.pull` does."""
    reference = Reference.parse(name)
    wanted = platform if platform is not None else Platform.host()
    registry = Registry(reference, plain_http=plain_http)
    try:
        with store.using():
            fetch = _Fetch(store, registry, progress or (lambda _: None))
            raw, media_type, digest = registry.manifest(reference.selector)
            document = parse_document(raw, media_type, str(reference))
            target = Descriptor(media_type=document.media_type, digest=digest, size=len(raw))
            _keep(store, raw, digest)
            manifest = fetch.manifest(document, wanted, str(reference))
            fetch.blobs(manifest)
            store.tags.set(str(reference), target)
            return store.load(target, str(reference), wanted)
    finally:
        registry.close()


def _keep(store: Store, raw: bytes, digest: Digest) -> None:
    """Store a document under the digest it was asked for by, whatever the algorithm."""
    wanted = Descriptor(media_type="", digest=digest, size=len(raw))
    with store.blobs.resume(wanted) as writer:
        if writer is not None:
            writer.restart()
            writer.write(raw)
            writer.commit(wanted)


class _Fetch:
    """One pull."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        progress: Callable[[Progress], None],
    ) -> None:
        self._store = store
        self._registry = registry
        self._progress = progress

    def manifest(self, document: Manifest | Index, wanted: Platform, name: str) -> Manifest:
        """The manifest for the platform, fetched through the indexes."""
        depth = 0
        while isinstance(document, Index):
            depth += 1
            if depth > 4:
                msg = f"image {name}: indexes nested too deep"
                raise FormatError(msg)
            entry = document.choose(wanted)
            if self._store.blobs.has(entry.digest):
                raw, media_type = self._store.blobs.read(entry.digest), entry.media_type
            else:
                raw, media_type, digest = self._registry.manifest(str(entry.digest))
                _keep(self._store, raw, digest)
            document = parse_document(raw, media_type or entry.media_type, name)
        if document.config.media_type not in MediaType.CONFIGS:
            msg = f"{name} is no image: it holds {document.config.media_type}"
            raise FormatError(msg)
        return document

    def blobs(self, manifest: Manifest) -> None:
        """Fetch what is missing, several at a time; the first failure ends it."""
        unique = {blob.digest: blob for blob in manifest.blobs}
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="pull") as threads:
            jobs = [threads.submit(self._blob, blob) for blob in unique.values()]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _blob(self, blob: Descriptor) -> None:
        try:
            self._take(blob, direct=False)
        except FormatError:
            if not self._registry.mirrors:
                raise
            # A mirror's bytes were wrong.
            self._take(blob, direct=True)

    def _take(self, blob: Descriptor, *, direct: bool) -> None:
        with self._store.blobs.resume(blob) as writer:
            if writer is None:
                self._progress(
                    Progress(digest=blob.digest, done=blob.size, total=blob.size, note="exists"),
                )
                return
            attempts, wait_s = 0, 0.2
            while writer.size < blob.size or not blob.size:
                before = writer.size
                try:
                    self._stream(blob, writer, direct=direct)
                    break
                except HostError:
                    # Whatever came counts: only attempts that bring nothing use themselves up.
                    attempts = 1 if writer.size > before else attempts + 1
                    if attempts >= _ATTEMPTS:
                        raise
                time.sleep(wait_s)
                wait_s = min(wait_s * 2, _MAX_WAIT_S)
            writer.commit(blob)

    def _stream(self, blob: Descriptor, writer: BlobWriter, *, direct: bool) -> None:
        """Take what one answer brings; never more than the blob's length."""
        with self._registry.blob(blob.digest, writer.size, direct=direct) as response:
            if writer.size:
                begins = response.headers.get("content-range", "")
                if response.status != 206 or not begins.startswith(f"bytes {writer.size}-"):
                    writer.restart()
                    if response.status == 206:
                        msg = f"{blob.digest}: the registry sent another range than asked for"
                        raise HostError(msg)
            while chunk := response.read(_CHUNK):
                if writer.size + len(chunk) > blob.size:
                    writer.discard()
                    msg = f"blob {blob.digest} is longer than its manifest says ({blob.size})"
                    raise FormatError(msg)
                writer.write(chunk)
                self._progress(Progress(digest=blob.digest, done=writer.size, total=blob.size))

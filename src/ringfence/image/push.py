"""Images sent to registries; what a registry has already is mounted or left out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, cast

from ringfence.errors import ConfigError, FormatError, NotFoundError
from ringfence.image.manifests import Descriptor, Index, Manifest, parse_document
from ringfence.image.references import Digest, Reference
from ringfence.image.registry import Registry
from ringfence.image.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.image.store import Store

__all__ = ["push"]

_PARALLEL = 4


def push(
    store: Store,
    name: str,
    destination: str | None,
    *,
    plain_http: bool,
    progress: Callable[[Progress], None] | None,
) -> Digest:
    """What `Store.push` does."""
    image = store.get(name)
    if destination is None and image.name == str(image.target.digest):
        msg = f"image {name} has no name to be pushed as"
        raise ConfigError(msg, hint=f"say where to: ringfence image push {name} HOST/NAME:TAG")
    reference = Reference.parse(destination or image.name)
    if reference.digest is not None:
        msg = f"cannot push to {reference}: a digest can't be chosen"
        raise ConfigError(msg)
    with store.using():
        whole = _whole(store, image.target)
        top = whole[-1] if whole else image.manifest
        manifests = whole or [image.manifest]
        blobs = {b.digest: b for m in manifests if isinstance(m, Manifest) for b in m.blobs}
        sources = _sources(store, reference, set(blobs))
        registry = Registry(
            reference,
            plain_http=plain_http,
            actions="pull,push",
            also=sorted(set(sources.values())),
        )
        try:
            send = _Send(store, registry, sources, progress or (lambda _: None))
            send.blobs(list(blobs.values()))
            for manifest in manifests:
                selector = reference.selector if manifest is top else None
                registry.put_manifest(
                    selector or str(manifest.descriptor.digest),
                    manifest.raw,
                    manifest.media_type,
                )
        finally:
            registry.close()
    return top.descriptor.digest


def _whole(store: Store, target: Descriptor) -> list[Manifest | Index]:
    """The documents below `target`, itself last; empty when some of it isn't here."""
    try:
        document = parse_document(store.blobs.read(target.digest), target.media_type)
        if isinstance(document, Manifest):
            return [document] if all(store.blobs.has(b.digest) for b in document.blobs) else []
        found: list[Manifest | Index] = []
        for entry in document.manifests:
            below = _whole(store, entry)
            if not below:
                return []
            found += below
    except (NotFoundError, FormatError):
        return []
    return [*found, document]


def _sources(store: Store, reference: Reference, wanted: set[Digest]) -> dict[Digest, str]:
    """In which other repository of the same registry a blob probably is: by the store's names."""
    found: dict[Digest, str] = {}
    for tag in store.tags:
        if tag.dangling:
            continue
        other = Reference.parse(tag.name)
        if other.registry != reference.registry or other.repository == reference.repository:
            continue
        for document in _whole(store, tag.target):
            if isinstance(document, Manifest):
                for blob in document.blobs:
                    if blob.digest in wanted:
                        found.setdefault(blob.digest, other.repository)
    return found


class _Counted:
    """A file that tells how far it was read."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None]) -> None:
        self._file = file
        self._told = told

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._told(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)


class _Send:
    """One push."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        sources: dict[Digest, str],
        progress: Callable[[Progress], None],
    ) -> None:
        self._store = store
        self._registry = registry
        self._sources = sources
        self._progress = progress

    def blobs(self, blobs: list[Descriptor]) -> None:
        """Send what the registry lacks, several at a time."""
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="push") as threads:
            jobs = [threads.submit(self._blob, blob) for blob in blobs]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _blob(self, blob: Descriptor) -> None:
        if self._registry.has_blob(blob.digest):
            self._tell(blob, blob.size, "exists")
            return
        location = None
        source = self._sources.get(blob.digest)
        if source is not None:
            location = self._registry.mount(blob.digest, source)
            if location is None:
                self._tell(blob, blob.size, "mounted")
                return
        with self._store.blobs.open(blob.digest) as file:
            counted = _Counted(file, lambda done: self._tell(blob, done))
            self._registry.upload(blob.digest, blob.size, cast("BinaryIO", counted), location)
        self._tell(blob, blob.size)

    def _tell(self, blob: Descriptor, done: int, note: str = "") -> None:
        self._progress(Progress(digest=blob.digest, done=done, total=blob.size, note=note))

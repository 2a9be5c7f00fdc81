"""Garbage: blobs and layers that no name leads to, and what killed processes left."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.errors import FormatError, NotFoundError
from ringfence.image import jsonio
from ringfence.image.config import ImageConfig, chain_ids
from ringfence.image.locking import locked, try_lock
from ringfence.image.manifests import Descriptor, Index, MediaType, parse_document
from ringfence.image.references import Digest
from ringfence.image.rootfs import MAPPED, remove_tree

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.image.store import Store

__all__ = ["Pruned", "prune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was removed.

    Args:
        names: Names of images.
        blobs: Number of blobs.
        layers: Number of unpacked layers.
        size: Bytes of the blobs.
    """

    names: tuple[str, ...]
    blobs: int
    layers: int
    size: int


class _Reach:
    """Everything that names lead to."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.blobs: set[Digest] = set()
        self.layers: set[str] = set()

    def add(self, target: Descriptor) -> None:
        """Follow a manifest or index as far as its blobs are here."""
        if target.digest in self.blobs:
            return
        self.blobs.add(target.digest)
        try:
            found = parse_document(self._store.blobs.read(target.digest), target.media_type)
        except (NotFoundError, FormatError):
            return
        if isinstance(found, Index):
            for entry in found.manifests:
                self.add(entry)
            return
        self.blobs.update(blob.digest for blob in found.blobs)
        if found.config.media_type in MediaType.CONFIGS:
            try:
                config = ImageConfig.parse(self._store.blobs.read(found.config.digest))
            except (NotFoundError, FormatError):
                return
            self.layers.update(d.hex for d in config.diff_ids)
            self.layers.update(d.hex for d in chain_ids(config.diff_ids))


def _in_use(folder: Path) -> bool:
    lease = folder / "lease"
    if not lease.exists():
        return False
    fd = try_lock(lease, shared=False)
    if fd is None:
        return True
    os.close(fd)
    return False


def _drop_names(store: Store, *, every: bool) -> list[str]:
    dropped: list[str] = []
    for tag in store.tags:
        unwanted = tag.dangling
        if every and not unwanted:
            reach = _Reach(store)
            reach.add(tag.target)
            folders = [name + end for name in reach.layers for end in ("", MAPPED)]
            unwanted = not any(_in_use(store.root / "layers" / name) for name in folders)
        if unwanted and store.tags.remove(tag.name):
            dropped.append(tag.name)
    return dropped


def prune(store: Store, *, every: bool, timeout_s: float) -> Pruned:
    """What `Store.prune` does."""
    with locked(store.root / "lock", shared=False, timeout_s=timeout_s):
        names = _drop_names(store, every=every)
        reach = _Reach(store)
        for tag in store.tags:
            reach.add(tag.target)
        for digest in cached_layers(store, drop=every):
            reach.blobs.add(digest)
        layers = 0
        for folder in list((store.root / "layers").iterdir()):
            if folder.name.removesuffix(MAPPED) not in reach.layers and not _in_use(folder):
                # Out of sight first: a half removed layer must never be seen as one.
                gone = store.blobs.temporary()
                folder.rename(gone)
                remove_tree(gone)
                layers += 1
        for path in list((store.root / "disks").iterdir()):
            if path.stem not in reach.layers:
                path.unlink()
        blobs = size = 0
        for digest in list(store.blobs.digests()):
            if digest not in reach.blobs:
                size += store.blobs.size(digest)
                store.blobs.path(digest).unlink()
                blobs += 1
        for left in ("tmp", "partial"):
            for path in list((store.root / left).iterdir()):
                if path.is_dir() and not path.is_symlink():
                    remove_tree(path)
                else:
                    path.unlink()
    return Pruned(names=tuple(names), blobs=blobs, layers=layers, size=size)


def cached_layers(store: Store, *, drop: bool) -> list[Digest]:
    """Blobs that builds may use again; forgotten with `drop`."""
    found: list[Digest] = []
    for path in (store.root / "steps").glob("*.json"):
        if drop:
            path.unlink()
            continue
        try:
            obj = jsonio.load(path.read_bytes(), str(path))
            layers = jsonio.objects(obj, "layers", str(path))
            found += [Digest.parse(jsonio.text(entry, "digest", str(path))) for entry in layers]
        except FormatError:
            path.unlink()
    return found

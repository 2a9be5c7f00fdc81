"""Unpacked layers: each once in the store, as a lower directory of any number of overlays.

A layer is kept by the digest of its tar, so that images share it whatever lies below it; one
that leans on the layers below (it leaves out directories, or links to their files) is kept by
the digest of its whole stack.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ringfence.errors import FormatError, HostError, InternalError
from ringfence.image.compression import Decompressed
from ringfence.image.config import chain_ids
from ringfence.image.erofs import write_erofs
from ringfence.image.locking import locked, try_lock
from ringfence.image.merged import merge
from ringfence.image.ownership import Ownership
from ringfence.image.references import Digest
from ringfence.image.unpack import unpack_layer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from ringfence.image.manifests import Descriptor
    from ringfence.image.store import Image, Store

__all__ = ["RootTree", "disk", "remove_tree", "rootfs", "tree_of"]


@dataclass(slots=True, kw_only=True)
class RootTree:
    """An image's layers on disk, held against the collector of garbage until it is closed.

    The hold is a lock on open files: it lasts as long as this process, or another that inherited
    `leases`, keeps them open.

    Args:
        layers: Directories to be used as an overlay's lower ones, the lowest first; read only.
        leases: The open files that hold them.
    """

    layers: tuple[Path, ...]
    leases: list[int] = field(default_factory=list)

    @property
    def overlay_lowerdir(self) -> str:
        """The value of overlay's option ``lowerdir``: the highest first, special bytes escaped."""
        escaped = (str(p).replace("\\", "\\\\").replace(":", "\\:") for p in reversed(self.layers))
        return ":".join(escaped)

    def close(self) -> None:
        """Let go of them; may be called again."""
        while self.leases:
            os.close(self.leases.pop())

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of them."""
        self.close()


def rootfs(store: Store, image: Image) -> RootTree:
    """What `Store.rootfs` does."""
    layers, diff_ids = image.manifest.layers, image.config.diff_ids
    if len(layers) != len(diff_ids):
        msg = f"image {image.name}: {len(layers)} layers, but {len(diff_ids)} digests of them"
        raise FormatError(msg)
    return tree_of(store, layers, diff_ids)


def tree_of(
    store: Store,
    layers: Sequence[Descriptor],
    diff_ids: tuple[Digest, ...],
) -> RootTree:
    """A stack of layers, unpacked and held; as many digests of tars as layers."""
    found: list[Path] = []
    tree = RootTree(layers=())
    with store.using():
        try:
            for blob, diff_id, chain in zip(layers, diff_ids, chain_ids(diff_ids), strict=True):
                folder = _layer(store, blob, diff_id, chain, found)
                tree.leases.append(_lease(folder))
                found.append(folder / "diff")
        except BaseException:
            tree.close()
            raise
    # An overlay takes a directory once; only the highest occurrence of a layer counts.
    kept = dict.fromkeys(reversed(found))
    tree.layers = tuple(reversed(kept))
    return tree


def _lease(folder: Path) -> int:
    lease = try_lock(folder / "lease", shared=True)
    if lease is None:
        msg = f"layer {folder} is locked by somebody who isn't the collector of garbage"
        raise InternalError(msg)
    return lease


def _layer(
    store: Store,
    blob: Descriptor,
    diff_id: Digest,
    chain: Digest,
    lowers: Sequence[Path],
) -> Path:
    """The layer's directory, unpacked if it wasn't."""
    folders = [store.root / "layers" / name.hex for name in dict.fromkeys((diff_id, chain))]
    for folder in folders:
        if (folder / "diff").is_dir():
            return folder
    with locked(store.root / "partial" / f"layer-{diff_id.hex}.lock", shared=False):
        for folder in folders:
            if (folder / "diff").is_dir():
                return folder
        return _unpack(store, blob, diff_id, chain, lowers)


def _unpack(
    store: Store,
    blob: Descriptor,
    diff_id: Digest,
    chain: Digest,
    lowers: Sequence[Path],
) -> Path:
    work = store.blobs.temporary()
    (work / "diff").mkdir(parents=True)
    try:
        with store.blobs.open(blob.digest) as file, Decompressed(file, store.limits) as tar:
            done = unpack_layer(
                tar,
                work / "diff",
                ownership=Ownership.default(),
                limits=store.limits,
                lowers=lowers,
            )
        _check(blob, tar.digest, diff_id)
        (work / "lease").touch(mode=0o600)
        name = chain if done.needs_lower and lowers else diff_id
        target = store.root / "layers" / name.hex
        work.rename(target)
    except BaseException:
        remove_tree(work)
        raise
    return target


def disk(store: Store, image: Image) -> Path:
    """What `Store.disk` does."""
    chain = chain_ids(image.config.diff_ids)
    name = chain[-1] if chain else Digest.of(b"")
    target = store.root / "disks" / f"{name.hex}.erofs"
    if target.exists():
        return target
    with (
        store.using(),
        locked(store.root / "partial" / f"disk-{name.hex}.lock", shared=False),
        rootfs(store, image) as tree,
    ):
        if target.exists():
            return target
        work = store.blobs.temporary()
        try:
            write_erofs(merge(tree.layers), work, bytes.fromhex(name.hex[:32]))
            work.chmod(0o444)
            work.rename(target)
        except OSError as error:
            work.unlink(missing_ok=True)
            msg = f"cannot make a disk of {image.name}: {error.strerror}"
            raise HostError(msg, errno=error.errno, path=error.filename) from error
        except BaseException:
            work.unlink(missing_ok=True)
            raise
    return target


def _check(blob: Descriptor, found: Digest, promised: Digest) -> None:
    if found != promised:
        msg = f"layer {blob.digest} unpacks to {found}, but the image says {promised}"
        raise FormatError(msg)


def remove_tree(path: Path) -> None:
    """Remove a tree of ours, directories without write permission too."""
    if os.geteuid() != 0:
        for folder, _, _ in os.walk(path):
            Path(folder).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)

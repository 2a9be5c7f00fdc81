"""Unpacked layers: each once in the store, as a lower directory of any number of overlays.

A layer is kept by the digest of its tar, so that images share it whatever lies below it; one
that leans on the layers below (it leaves out directories, or links to their files) is kept by
the digest of its whole stack.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ringfence.errors import FormatError, HostError, InternalError
from ringfence.image import jsonio
from ringfence.image.compression import Decompressed
from ringfence.image.config import chain_ids
from ringfence.image.erofs import write_erofs
from ringfence.image.idmap import SubordinateIds, run_mapped
from ringfence.image.locking import locked, try_lock
from ringfence.image.merged import merge
from ringfence.image.ownership import Ownership
from ringfence.image.references import Digest
from ringfence.image.unpack import unpack_layer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from ringfence.image.jsonio import Json
    from ringfence.image.manifests import Descriptor
    from ringfence.image.store import Image, Store

MAPPED = "-mapped"
"""Ends the name of a layer whose files belong to subordinate users."""

__all__ = ["MAPPED", "RootTree", "disk", "remove_tree", "rootfs", "tree_of"]


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


def rootfs(store: Store, image: Image, *, mapped: bool = False) -> RootTree:
    """What `Store.rootfs` does."""
    layers, diff_ids = image.manifest.layers, image.config.diff_ids
    if len(layers) != len(diff_ids):
        msg = f"image {image.name}: {len(layers)} layers, but {len(diff_ids)} digests of them"
        raise FormatError(msg)
    ids = SubordinateIds.of_this_user() if mapped and os.geteuid() != 0 else None
    return tree_of(store, layers, diff_ids, ids)


def tree_of(
    store: Store,
    layers: Sequence[Descriptor],
    diff_ids: tuple[Digest, ...],
    ids: SubordinateIds | None = None,
) -> RootTree:
    """A stack of layers, unpacked and held; as many digests of tars as layers."""
    found: list[Path] = []
    tree = RootTree(layers=())
    with store.using():
        try:
            for blob, diff_id, chain in zip(layers, diff_ids, chain_ids(diff_ids), strict=True):
                folder = _layer(store, blob, (diff_id, chain), found, ids)
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
    names: tuple[Digest, Digest],
    lowers: Sequence[Path],
    ids: SubordinateIds | None,
) -> Path:
    """The layer's directory, unpacked if it wasn't; `names` are its own and its stack's."""
    suffix = MAPPED if ids is not None else ""
    folders = [store.root / "layers" / f"{name.hex}{suffix}" for name in dict.fromkeys(names)]
    for folder in folders:
        if (folder / "diff").is_dir():
            return folder
    with locked(store.root / "partial" / f"layer-{names[0].hex}{suffix}.lock", shared=False):
        for folder in folders:
            if (folder / "diff").is_dir():
                return folder
        work = store.blobs.temporary()
        (work / "diff").mkdir(parents=True)
        try:
            found, leans = _unpack(store, blob, work / "diff", lowers, ids)
            _check(blob, found, names[0])
            (work / "lease").touch(mode=0o600)
            target = folders[-1] if leans and lowers else folders[0]
            work.rename(target)
        except BaseException:
            remove_tree(work)
            raise
    return target


def _unpack(
    store: Store,
    blob: Descriptor,
    target: Path,
    lowers: Sequence[Path],
    ids: SubordinateIds | None,
) -> tuple[Digest, bool]:
    """Unpack; returns the tar's digest, and whether the layer leans on those below."""
    if ids is not None:
        request: dict[str, Json] = {
            "blob": str(store.blobs.path(blob.digest)),
            "target": str(target),
            "lowers": [str(path) for path in lowers],
            **dataclasses.asdict(store.limits),
        }
        answer = run_mapped(ids, request)
        digest = Digest.parse(jsonio.text(answer, "digest", "answer"))
        return digest, answer.get("needs_lower") is True
    with store.blobs.open(blob.digest) as file, Decompressed(file, store.limits) as tar:
        done = unpack_layer(
            tar,
            target,
            ownership=Ownership.default(),
            limits=store.limits,
            lowers=lowers,
        )
    return tar.digest, done.needs_lower


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


def _unmount_below(path: Path) -> None:
    """Take away the mounts that a killed build left: removing must not go through them."""
    top = str(path)
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split(" ", 5)[4]
        if place.startswith(top + "/"):
            found.append(place)
    for place in reversed(found):
        command = ["umount", "--lazy", place]
        subprocess.run(command, check=False, capture_output=True)


def remove_tree(path: Path) -> None:
    """Remove a tree of ours: mounts in it first, directories without write permission too."""
    if os.geteuid() == 0:
        _unmount_below(path)
    if os.geteuid() != 0:
        for folder, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                Path(folder).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)
    if path.exists() and os.geteuid() != 0 and (ids := SubordinateIds.of_this_user()) is not None:
        # Files of subordinate users; who can make them can remove them.
        run_mapped(ids, {"remove": str(path)})

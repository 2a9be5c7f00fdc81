"""What a stack of layers changes: the names that images' upper layers add, change or remove."""

from __future__ import annotations

import enum
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.image.treefd import find_lower

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ringfence.image.store import Image, Store

__all__ = [
    "Change",
    "ChangeKind",
    "image_changes",
    "is_opaque",
    "is_whiteout",
    "layer_changes",
    "walk_layer",
]


class ChangeKind(enum.Enum):
    """What became of a name, by Docker's letters."""

    ADDED = "A"
    CHANGED = "C"
    REMOVED = "D"


@dataclass(frozen=True, slots=True)
class Change:
    """One name.

    Args:
        kind: What became of it.
        path: Absolute in the image.
    """

    kind: ChangeKind
    path: str


def is_whiteout(status: os.stat_result) -> bool:
    """Whether it is overlay's sign for a removed name."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: Path) -> bool:
    """Whether the directory hides what is below it."""
    for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
        try:
            if os.getxattr(path, name, follow_symlinks=False) == b"y":
                return True
        except OSError:
            continue
    return False


def walk_layer(root: Path) -> Iterator[tuple[bytes, os.DirEntry[str]]]:
    """All names of an unpacked layer, sorted, what is in a directory right after it."""
    pending = _listed(b"", str(root))
    while pending:
        name, entry = pending.pop()
        yield name, entry
        if entry.is_dir(follow_symlinks=False):
            pending += _listed(name + b"/", entry.path)


def _listed(prefix: bytes, folder: str) -> list[tuple[bytes, os.DirEntry[str]]]:
    """A directory's names, the last first."""
    with os.scandir(folder) as found:
        names = [(prefix + os.fsencode(entry.name), entry) for entry in found]
    return sorted(names, key=lambda pair: pair[0], reverse=True)


def layer_changes(layer: Path, lowers: Sequence[Path]) -> Iterator[Change]:
    """What one unpacked layer does to those below it.

    Args:
        layer: Its directory.
        lowers: Those below, lowest first.
    """
    for name, entry in walk_layer(layer):
        path = "/" + os.fsdecode(name)
        status = entry.stat(follow_symlinks=False)
        if is_whiteout(status):
            yield Change(ChangeKind.REMOVED, path)
            continue
        below = find_lower(lowers, name)
        yield Change(ChangeKind.ADDED if below is None else ChangeKind.CHANGED, path)
        if stat.S_ISDIR(status.st_mode) and below is not None and is_opaque(Path(entry.path)):
            own = {entry.name for entry in os.scandir(entry.path)}
            for hidden in sorted(_names_below(lowers, name) - own):
                yield Change(ChangeKind.REMOVED, f"{path}/{hidden}")


def _names_below(lowers: Sequence[Path], name: bytes) -> set[str]:
    found: set[str] = set()
    for lower in lowers:
        folder = lower / os.fsdecode(name)
        if folder.is_dir() and not folder.is_symlink():
            found |= {entry.name for entry in os.scandir(folder)}
    return found


def image_changes(store: Store, image: Image, base: Image | None = None) -> list[Change]:
    """What an image changes over another that it was built on, or its last layer over the rest.

    Layers that both have from the bottom up are passed over.
    """
    shared = 0
    if base is not None:
        pairs = zip(image.config.diff_ids, base.config.diff_ids, strict=False)
        for mine, theirs in pairs:
            if mine != theirs:
                break
            shared += 1
    else:
        shared = max(len(image.config.diff_ids) - 1, 0)
    found: dict[str, Change] = {}
    with store.rootfs(image) as tree:
        # A layer that came twice stands only once in the tree; it is rare and changes nothing.
        start = min(shared, len(tree.layers))
        for index in range(start, len(tree.layers)):
            for change in layer_changes(tree.layers[index], tree.layers[:start]):
                found[change.path] = change
    return sorted(found.values(), key=lambda change: change.path)

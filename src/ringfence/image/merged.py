"""A stack of unpacked layers as one tree, in memory: what an overlay of them would show."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from ringfence.image.changes import is_whiteout
from ringfence.image.ownership import OVERRIDE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Node", "merge"]

_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")
_HIDDEN = ("trusted.overlay.", "user.overlay.")


class Node:
    """One inode of the merged tree.

    ``source`` is where its data is; ``children`` is there for directories alone; ``links`` counts
    the names of what isn't a directory.
    """

    __slots__ = (
        "attributes", "children", "gid", "links", "mode", "mtime_ns", "rdev", "size", "source",
        "uid",
    )  # fmt: skip

    def __init__(self, source: str, status: os.stat_result) -> None:
        self.source = source
        self.mode = status.st_mode
        self.uid = status.st_uid
        self.gid = status.st_gid
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self.rdev = status.st_rdev
        self.links = 0
        self.attributes: dict[str, bytes] = {}
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(status.st_mode) else None


def merge(layers: Sequence[Path]) -> Node:
    """Put layers together, the lowest first.

    Raises:
        OSError: A layer can't be read.
    """
    root: Node | None = None
    for layer in layers:
        linked: dict[tuple[int, int], Node] = {}
        node, opaque = _node(str(layer), os.lstat(layer))
        if root is not None and not opaque:
            node.children = root.children
        root = node
        pending = [(str(layer), node)]
        while pending:
            path, folder = pending.pop()
            pending += _overlay(path, folder, linked)
    if root is None:
        root = Node("", os.lstat("/"))
        root.mode, root.uid, root.gid, root.mtime_ns = stat.S_IFDIR | 0o755, 0, 0, 0
    _count(root)
    return root


def _overlay(
    path: str,
    folder: Node,
    linked: dict[tuple[int, int], Node],
) -> list[tuple[str, Node]]:
    """Lay a directory's entries over what is there; returns its directories."""
    children = folder.children
    below: list[tuple[str, Node]] = []
    if children is None:
        return below
    with os.scandir(path) as found:
        for entry in found:
            name = os.fsencode(entry.name)
            status = entry.stat(follow_symlinks=False)
            if is_whiteout(status):
                children.pop(name, None)
                continue
            key = (status.st_dev, status.st_ino)
            if status.st_nlink > 1 and key in linked:
                children[name] = linked[key]
                continue
            node, opaque = _node(entry.path, status)
            if node.children is not None:
                before = children.get(name)
                if before is not None and before.children is not None and not opaque:
                    node.children = before.children
                below.append((entry.path, node))
            elif status.st_nlink > 1:
                linked[key] = node
            children[name] = node
    return below


def _node(path: str, status: os.stat_result) -> tuple[Node, bool]:
    """The inode, and whether it hides what is below it."""
    node = Node(path, status)
    opaque = False
    for name in os.listxattr(path, follow_symlinks=False):
        value = os.getxattr(path, name, follow_symlinks=False)
        if name.startswith(_HIDDEN):
            opaque = opaque or (name in _OPAQUE and value == b"y")
        elif name == OVERRIDE.decode():
            _override(node, value)
        else:
            node.attributes[name] = value
    return node, opaque


def _override(node: Node, value: bytes) -> None:
    """Take the owner and mode that couldn't be set on the file itself."""
    parts = value.split(b":")
    if len(parts) >= 3 and parts[0].isdigit() and parts[1].isdigit() and parts[2].isdigit():
        node.uid, node.gid = int(parts[0]), int(parts[1])
        node.mode = stat.S_IFMT(node.mode) | (int(parts[2], 8) & 0o7777)


def _count(root: Node) -> None:
    """Count the names of each inode; a directory's are its own, its children's and its parent's."""
    pending = [root]
    root.links = 1
    while pending:
        node = pending.pop()
        for child in (node.children or {}).values():
            child.links += 1
            if child.children is not None:
                node.links += 1
                pending.append(child)
        if node.children is not None:
            node.links += 1

"""The image so far, for looking things up: where a path leads, who a user is."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError

if TYPE_CHECKING:
    from ringfence.image.merged import Node

__all__ = ["View"]

_MAX_LINKS = 40


class View:
    """A merged tree with paths resolved in it.

    Args:
        root: The tree.
    """

    def __init__(self, root: Node) -> None:
        self.root = root

    def resolve(self, path: str, *, last: bool = True) -> tuple[tuple[bytes, ...], Node | None]:
        """Where a path leads, links followed below the tree's root.

        Args:
            path: Absolute.
            last: Follow a link as the last component, too.

        Returns:
            The path without links, and what is there.

        Raises:
            ConfigError: The links go in a circle, or a file stands in for a directory.
        """
        todo = os.fsencode(path).split(b"/")[::-1]
        here: list[bytes] = []
        nodes = [self.root]
        links = 0
        missing = False
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                del here[-1:]
                if len(nodes) > 1 and not missing:
                    nodes.pop()
                continue
            child = None if missing else (nodes[-1].children or {}).get(part)
            if child is not None and stat.S_ISLNK(child.mode) and (last or any(todo)):
                links += 1
                if links > _MAX_LINKS:
                    msg = f"{path} leads through a circle of links"
                    raise ConfigError(msg)
                target = os.fsencode(Path(child.source).readlink())
                if target.startswith(b"/"):
                    here, nodes = [], [self.root]
                todo += target.split(b"/")[::-1]
                continue
            here.append(part)
            if child is None:
                missing = True
            else:
                nodes.append(child)
        return tuple(here), None if missing else nodes[-1]

    def text(self, path: str) -> str:
        """A file's text; empty where there is none."""
        _, node = self.resolve(path)
        if node is None or not stat.S_ISREG(node.mode):
            return ""
        return Path(node.source).read_text(errors="surrogateescape")

    def owner(self, text: str) -> tuple[int, int]:
        """The numbers of ``user[:group]``.

        Raises:
            ConfigError: The image has no such user or group.
        """
        user, colon, group = text.partition(":")
        uid, gid = self._number(user, "/etc/passwd")
        if colon:
            gid = self._number(group, "/etc/group")[0]
        return uid, gid

    def _number(self, name: str, path: str) -> tuple[int, int]:
        """A name's number, and for users their group's; a number's group is itself."""
        if name.isdigit():
            return int(name), int(name)
        for line in self.text(path).splitlines():
            fields = line.split(":")
            if fields[0] == name and len(fields) > 2 and fields[2].isdigit():
                own = fields[3] if len(fields) > 3 and fields[3].isdigit() else fields[2]
                return int(fields[2]), int(own)
        msg = f"the image has no {name!r} in {path}"
        raise ConfigError(msg)

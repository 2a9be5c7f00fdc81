"""A directory tree that is written through descriptors: no name ever leads out of it.

Names are resolved component by component, without following links; where a link stands in for a
directory, it is followed below the tree's own root only. Nobody else writes to the tree.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from ringfence.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Tree", "find_lower", "remove_tree", "shown"]

OPEN_DIR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CACHE = 256
_MAX_LINKS = 40


def shown(name: bytes) -> str:
    """A name for messages."""
    return repr(os.fsdecode(name[:200]))


class Tree:
    """Directories below one root, by their path.

    Args:
        path: The root.
        depth: Components that a path may have.
        made: Is told of each directory that had to be made on the way to another.
        revived: Likewise, with a descriptor, where a whiteout stood in its place.
    """

    def __init__(
        self,
        path: Path,
        depth: int,
        made: Callable[[bytes], None],
        revived: Callable[[int], None],
    ) -> None:
        self.root = os.open(path, OPEN_DIR)
        self.fds: dict[bytes, int] = {}
        self._depth = depth
        self._made = made
        self._revived = revived

    def close(self) -> None:
        """Close all descriptors."""
        self.forget()
        os.close(self.root)

    def forget(self) -> None:
        """Close the descriptors of directories: some are about to go away."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def split(self, name: bytes) -> tuple[bytes, bytes]:
        """The canonical directory and the last component."""
        if b"\0" in name:
            msg = f"the layer has a name with a NUL: {shown(name)}"
            raise FormatError(msg)
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            msg = f"the layer tries to get out of its directory: {shown(name)}"
            raise FormatError(msg)
        if len(parts) > self._depth:
            msg = f"the layer has a path of {len(parts)} components"
            raise FormatError(msg)
        if not parts:
            return b"", b""
        base = parts.pop()
        return b"/".join(parts), base

    def parent(self, path: bytes, *, make: bool = True) -> int:
        """A descriptor of the directory; made, if it may be, when missing.

        Links on the way are followed below the layer's root only.
        """
        if not path:
            return self.root
        fd = self.fds.get(path)
        if fd is not None:
            return fd
        above, _, base = path.rpartition(b"/")
        fd = self._enter(self.parent(above, make=make), path, base, make=make)
        if len(self.fds) >= _CACHE:
            self.forget()
        self.fds[path] = fd
        return fd

    def _enter(self, above: int, path: bytes, base: bytes, *, make: bool) -> int:
        try:
            return os.open(base, OPEN_DIR, dir_fd=above)
        except FileNotFoundError:
            if not make:
                raise
            os.mkdir(base, 0o700, dir_fd=above)
            self._made(path)
            return os.open(base, OPEN_DIR, dir_fd=above)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
        status = os.stat(base, dir_fd=above, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            return self._follow(path, make=make)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            # Removed from below, then made anew: an opaque directory.
            os.unlink(base, dir_fd=above)
            os.mkdir(base, 0o700, dir_fd=above)
            fd = os.open(base, OPEN_DIR, dir_fd=above)
            self._made(path)
            self._revived(fd)
            return fd
        msg = f"the layer uses a file as a directory: {shown(path)}"
        raise FormatError(msg)

    def _follow(self, path: bytes, *, make: bool) -> int:
        """The directory that a chain of links leads to, below the root."""
        todo = path.split(b"/")[::-1]
        here: list[bytes] = []
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                del here[-1:]
                continue
            above = self._real(here, make=make)
            try:
                target = os.readlink(part, dir_fd=above)
            except OSError as error:
                os.close(above)
                if error.errno not in (errno.EINVAL, errno.ENOENT):
                    raise
                here.append(part)
                continue
            os.close(above)
            links += 1
            if links > _MAX_LINKS:
                msg = f"the layer has a circle of links: {shown(path)}"
                raise FormatError(msg)
            if target.startswith(b"/"):
                here.clear()
            todo += target.split(b"/")[::-1]
        return self._real(here, make=make)

    def _real(self, parts: list[bytes], *, make: bool) -> int:
        """A new descriptor of a path without links."""
        fd = os.dup(self.root)
        for index, part in enumerate(parts):
            try:
                try:
                    below = os.open(part, OPEN_DIR, dir_fd=fd)
                except FileNotFoundError:
                    if not make:
                        raise
                    os.mkdir(part, 0o700, dir_fd=fd)
                    self._made(b"/".join(parts[: index + 1]))
                    below = os.open(part, OPEN_DIR, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd


def find_lower(lowers: Sequence[Path], name: bytes) -> Path | None:
    """The file in the highest layer that has it; links on the way are not followed."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    for lower in reversed(lowers):
        here = lower
        for index, part in enumerate(parts):
            here = here / os.fsdecode(part)
            try:
                status = here.stat(follow_symlinks=False)
            except FileNotFoundError:
                break
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                return None
            if index + 1 < len(parts) and not stat.S_ISDIR(status.st_mode):
                return None
        else:
            return here
    return None


def remove_tree(base: bytes, above: int) -> None:
    """Remove a directory of ours that is in the way; no link is followed."""
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        for name in os.listdir(fd):  # noqa: PTH208 - of a descriptor
            raw = os.fsencode(name)
            if stat.S_ISDIR(os.stat(raw, dir_fd=fd, follow_symlinks=False).st_mode):
                remove_tree(raw, fd)
            else:
                os.unlink(raw, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(base, dir_fd=above)

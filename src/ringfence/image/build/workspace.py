"""A writable root made of read-only layers, and what became of it.

Root mounts an overlay, whose upper directory is the change. Others copy the tree and compare it
afterwards: any change to a file, its attributes included, moves its time of change.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ringfence.errors import HostError
from ringfence.image.changes import walk_layer
from ringfence.image.merged import Node, merge
from ringfence.image.pack import PackOptions, file_entry, pack_tree
from ringfence.image.rootfs import remove_tree
from ringfence.image.tarformat import Entry, Kind

if TYPE_CHECKING:
    from types import TracebackType

    from ringfence.image.store import Store
    from ringfence.image.tarwrite import TarWriter

__all__ = ["Workspace", "open_workspace"]

_MAX_OPTION = 4000
"""Bytes of mount options: the kernel takes one page."""

Exclude = Callable[[bytes], bool]


class Workspace:
    """A writable root; a context manager that leaves nothing behind."""

    root: Path

    def pack(self, writer: TarWriter, exclude: Exclude, latest_ns: int | None) -> int:
        """Write what changed; returns the number of members."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove it."""
        self.close()


def open_workspace(store: Store, lowers: Sequence[Path]) -> Workspace:
    """A writable root over layers, the lowest first; they must be held meanwhile.

    Raises:
        HostError: It can't be made.
    """
    work = store.blobs.temporary()
    option = ":".join(map(str, lowers))
    if os.geteuid() == 0 and lowers and len(option) < _MAX_OPTION:
        return _Overlay(work, lowers)
    return _Copy(work, lowers)


class _Overlay(Workspace):
    def __init__(self, work: Path, lowers: Sequence[Path]) -> None:
        self._work = work
        self.root = work / "root"
        for name in ("root", "upper", "work"):
            (work / name).mkdir(parents=True)
        # The upper directory's own attributes become the root's.
        shutil.copystat(lowers[-1], work / "upper")
        status = lowers[-1].stat()
        os.chown(work / "upper", status.st_uid, status.st_gid)
        lower = ":".join(map(str, reversed(lowers)))
        options = f"lowerdir={lower},upperdir={work}/upper,workdir={work}/work"
        options += ",redirect_dir=off,metacopy=off,index=off"
        command = ["mount", "-t", "overlay", "-o", options, "ringfence-build", str(self.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            remove_tree(work)
            msg = f"cannot mount an overlay for the build: {done.stderr.strip()}"
            raise HostError(msg, path=str(work))

    def pack(self, writer: TarWriter, exclude: Exclude, latest_ns: int | None) -> int:
        options = PackOptions(overlay=True, exclude=exclude, latest_ns=latest_ns)
        return pack_tree(self._work / "upper", writer, options)

    def close(self) -> None:
        if self._work.exists():
            command = ["umount", "--lazy", str(self.root)]
            subprocess.run(command, check=False, capture_output=True)
            remove_tree(self._work)


class _Copy(Workspace):
    def __init__(self, work: Path, lowers: Sequence[Path]) -> None:
        self.root = work
        self._before: dict[bytes, int] = {}
        work.mkdir(parents=True)
        try:
            _copy(merge(lowers), work)
            for name, entry in walk_layer(work):
                self._before[name] = entry.stat(follow_symlinks=False).st_ctime_ns
        except OSError as error:
            remove_tree(work)
            msg = f"cannot copy the layers for the build: {error.strerror}"
            raise HostError(msg, errno=error.errno, path=error.filename) from error

    def pack(self, writer: TarWriter, exclude: Exclude, latest_ns: int | None) -> int:
        options = PackOptions(latest_ns=latest_ns)
        count = 0
        seen: set[bytes] = set()
        linked: dict[tuple[int, int], bytes] = {}
        for name, found in walk_layer(self.root):
            seen.add(name)
            status = found.stat(follow_symlinks=False)
            if self._before.get(name) == status.st_ctime_ns or exclude(name):
                continue
            if stat.S_ISSOCK(status.st_mode):
                continue
            count += 1
            entry = file_entry(name, found.path, status, options)
            first = linked.setdefault((status.st_dev, status.st_ino), name)
            if first != name and not stat.S_ISDIR(status.st_mode):
                entry.kind, entry.link, entry.size, entry.xattrs = Kind.HARD_LINK, first, 0, None
            if entry.kind == Kind.FILE:
                writer.add(entry, [Path(found.path).read_bytes()])
            else:
                writer.add(entry)
        for name in sorted(set(self._before) - seen):
            folder, _, last = name.rpartition(b"/")
            if exclude(name) or (folder and folder not in seen):
                continue
            above = folder + b"/" if folder else b""
            mark = Entry(above + b".wh." + last, Kind.FILE)
            mark.mode = 0o600
            writer.add(mark)
            count += 1
        return count

    def close(self) -> None:
        if self.root.exists():
            remove_tree(self.root)


def _copy(node: Node, target: Path) -> None:
    """Copy a merged tree; owners as far as this user may set them."""
    made: dict[int, Path] = {}
    pending = [(node, target)]
    folders: list[tuple[Node, Path]] = []
    while pending:
        folder, path = pending.pop()
        folders.append((folder, path))
        for name, child in (folder.children or {}).items():
            there = path / os.fsdecode(name)
            if child.children is not None:
                there.mkdir()
                pending.append((child, there))
            elif id(child) in made:
                there.hardlink_to(made[id(child)])
            else:
                made[id(child)] = there
                _copy_file(child, there)
    for folder, path in reversed(folders):
        path.chmod(stat.S_IMODE(folder.mode) | 0o700)
        os.utime(path, ns=(folder.mtime_ns, folder.mtime_ns))


def _copy_file(node: Node, there: Path) -> None:
    if stat.S_ISREG(node.mode):
        shutil.copyfile(node.source, there, follow_symlinks=False)
        there.chmod(stat.S_IMODE(node.mode) | 0o400)
    elif stat.S_ISLNK(node.mode):
        there.symlink_to(Path(node.source).readlink())
    else:
        return  # device nodes and the like: the machine has its own
    os.utime(there, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)

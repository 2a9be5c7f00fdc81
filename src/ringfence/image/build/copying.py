"""COPY and ADD: which files go where, and the layer that they make.

Source: Docker's Dockerfile reference, COPY and ADD; BuildKit where it is silent: files of the
context belong to root, those of another stage keep their owners.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, HostError
from ringfence.image.build.ignore import Ignore, glob_regex
from ringfence.image.build.view import View
from ringfence.image.merged import Node, merge
from ringfence.image.pack import PackOptions, contents, file_entry
from ringfence.image.tarformat import Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ringfence.image.tarwrite import TarWriter

__all__ = ["Copied", "Placing", "Source", "digest_of", "gather", "gather_texts", "write_copied"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where files come from.

    Args:
        root: The tree.
        ignore: What stays out of it.
        owned: Whether files keep their owners; else they are root's.
    """

    root: Node
    ignore: Ignore
    owned: bool = False

    @classmethod
    def directory(cls, path: Path, ignore: Ignore) -> Source:
        """A build's context."""
        return cls(root=merge([path]), ignore=ignore)


@dataclass(slots=True, kw_only=True)
class Copied:
    """One file, link or directory to be put into the image.

    Args:
        target: Where to, absolute, links resolved.
        node: What it is; None for a text.
        text: Its contents, when they aren't a file's.
        owned: Whether it keeps its owner.
    """

    target: tuple[bytes, ...]
    node: Node | None = None
    text: bytes = b""
    owned: bool = False


def gather(source: Source, patterns: Sequence[str], target: str, view: View) -> list[Copied]:
    """What an instruction copies.

    Args:
        source: Where from.
        patterns: Paths relative to it, with wildcards.
        target: Absolute in the image; with ``/`` at its end a directory.
        view: The image so far.

    Raises:
        ConfigError: Nothing matches, or several files go to one.
    """
    matched: list[tuple[str, Node]] = []
    for pattern in patterns:
        here = _matches(source, pattern)
        if not here:
            msg = f"there is no {pattern!r} to copy"
            raise ConfigError(msg, hint="it may be left out by .dockerignore")
        matched += here
    canonical, there = view.resolve(target)
    into = target.endswith(("/", "/.")) or (there is not None and there.children is not None)
    if len(matched) > 1 and not into:
        msg = f"several files are copied to {target}, which isn't a directory"
        raise ConfigError(msg, hint=f"write it as {target}/")
    found: list[Copied] = []
    for path, node in matched:
        if node.children is not None:
            found.append(Copied(target=canonical, node=node, owned=source.owned))
            found += _below(source, path, node, canonical, view)
        else:
            name = os.fsencode(path.rpartition("/")[2])
            place = (*canonical, name) if into else canonical
            found.append(Copied(target=place, node=node, owned=source.owned))
    return found


def gather_texts(texts: Sequence[tuple[str, bytes]], target: str, view: View) -> list[Copied]:
    """Files whose contents stand in the Dockerfile or came from elsewhere."""
    canonical, there = view.resolve(target)
    into = target.endswith("/") or (there is not None and there.children is not None)
    if len(texts) > 1 and not into:
        msg = f"several files are copied to {target}, which isn't a directory"
        raise ConfigError(msg, hint=f"write it as {target}/")
    return [
        Copied(target=(*canonical, os.fsencode(name)) if into else canonical, text=text)
        for name, text in texts
    ]


def _matches(source: Source, pattern: str) -> list[tuple[str, Node]]:
    """Paths and nodes that a pattern stands for, sorted."""
    parts: list[str] = []
    for part in pattern.split("/"):
        if part == "..":
            del parts[-1:]  # never out of the context
        elif part not in ("", "."):
            parts.append(part)
    level: list[tuple[str, Node]] = [("", source.root)]
    for index, part in enumerate(parts):
        matcher = re.compile(glob_regex(part), re.DOTALL)
        wild = any(char in part for char in "*?[\\")
        below: list[tuple[str, Node]] = []
        for path, node in level:
            folder = _directory_of(source, node)
            for name, child in sorted((folder.children or {}).items()):
                text = os.fsdecode(name)
                if text == part or (wild and matcher.fullmatch(text)):
                    full = f"{path}/{text}" if path else text
                    below.append((full, child))
        last = index == len(parts) - 1
        level = [(p, _directory_of(source, n) if last else n) for p, n in below]
    return [
        (path, node)
        for path, node in level
        if not source.ignore.ignores(path) or (node.children and source.ignore.has_exceptions)
    ]


def _directory_of(source: Source, node: Node) -> Node:
    """Where a link of the source leads, below its root; the node itself otherwise."""
    if not stat.S_ISLNK(node.mode):
        return node
    try:
        target = os.fsdecode(Path(node.source).readlink())
        top = Path(source.root.source)
        path = Path(node.source).parent / target
        relative = os.path.relpath(path, top) if not target.startswith("/") else target
        if relative.startswith(".."):
            return node
        found = View(source.root).resolve("/" + relative)[1]
    except OSError:
        return node
    return found if found is not None else node


def _below(
    source: Source,
    path: str,
    node: Node,
    target: tuple[bytes, ...],
    view: View,
) -> Iterator[Copied]:
    """All that is in a directory, each directory before what is in it."""
    for name, child in sorted((node.children or {}).items()):
        full = f"{path}/{os.fsdecode(name)}" if path else os.fsdecode(name)
        ignored = source.ignore.ignores(full)
        if ignored and not (child.children is not None and source.ignore.has_exceptions):
            continue
        place = (*target, name)
        if child.children is None:
            yield Copied(target=place, node=child, owned=source.owned)
            continue
        # A directory that lies behind a link in the image goes where the link leads.
        place = view.resolve(os.fsdecode(b"/" + b"/".join(place)))[0]
        below = list(_below(source, full, child, place, view))
        if not ignored or below:
            yield Copied(target=place, node=child, owned=source.owned)
        yield from below


def digest_of(files: Sequence[Copied]) -> str:
    """A digest of names, kinds, modes, owners and contents, but not of times."""
    total = hashlib.sha256()
    for item in files:
        node = item.node
        line = [b"/".join(item.target)]
        if node is None:
            line += [b"text", hashlib.sha256(item.text).digest()]
        else:
            line.append(b"%o" % node.mode)
            if item.owned:
                line.append(b"%d:%d" % (node.uid, node.gid))
            if stat.S_ISREG(node.mode):
                line.append(_file_digest(node.source))
            elif stat.S_ISLNK(node.mode):
                line.append(os.fsencode(Path(node.source).readlink()))
        for field in line:
            total.update(b"%d:" % len(field) + field)
    return total.hexdigest()


def _file_digest(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}"
        raise HostError(msg, errno=error.errno, path=path) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """How copied files are changed on their way.

    Args:
        owner: All belong to them; else root, or their own.
        mode: Of files (and of directories too); None keeps theirs.
        latest_ns: Later times are set back to it.
    """

    owner: tuple[int, int] | None = None
    mode: int | None = None
    latest_ns: int | None = None


def write_copied(
    files: Sequence[Copied],
    writer: TarWriter,
    view: View,
    placing: Placing,
) -> None:
    """Write the layer, with the directories above as the image has them."""
    made = _Parents(writer, view, placing)
    for item in files:
        made.above(item.target)
        if not item.target:
            continue
        name = b"/".join(item.target)
        node = item.node
        if node is None:
            entry = Entry(name, Kind.FILE)
            entry.mode = placing.mode if placing.mode is not None else 0o644
            entry.uid, entry.gid = placing.owner or (0, 0)
            entry.size = len(item.text)
            entry.mtime_ns = placing.latest_ns or 0
            writer.add(entry, [item.text])
            continue
        if node.children is not None:
            made.directory(item.target, node, owned=item.owned)
            continue
        if stat.S_ISSOCK(node.mode):
            continue
        owner = placing.owner or (None if item.owned else (0, 0))
        options = PackOptions(owner=owner, latest_ns=placing.latest_ns)
        entry = file_entry(name, node.source, os.lstat(node.source), options)
        if placing.mode is not None and entry.kind != Kind.SYMLINK:
            entry.mode = placing.mode
        if entry.kind == Kind.FILE and entry.size:
            writer.add(entry, contents(node.source))
        else:
            writer.add(entry)


class _Parents:
    """Directories of a layer, each written once."""

    def __init__(self, writer: TarWriter, view: View, placing: Placing) -> None:
        self._writer = writer
        self._view = view
        self._placing = placing
        self._done: set[tuple[bytes, ...]] = set()

    def above(self, target: tuple[bytes, ...]) -> None:
        """The directories above a file: as the image has them, else made for root."""
        for count in range(1, len(target)):
            part = target[:count]
            if part not in self._done:
                self._add(part, self._there(part), None)

    def _there(self, path: tuple[bytes, ...]) -> Node | None:
        node = self._view.resolve(os.fsdecode(b"/" + b"/".join(path)))[1]
        return node if node is not None and node.children is not None else None

    def directory(self, path: tuple[bytes, ...], node: Node, *, owned: bool) -> None:
        """A copied directory; one that the image has keeps its attributes."""
        if path not in self._done:
            own = (node.uid, node.gid) if owned else (0, 0)
            self._add(path, self._there(path), (node, self._placing.owner or own))

    def _add(
        self,
        path: tuple[bytes, ...],
        there: Node | None,
        new: tuple[Node, tuple[int, int]] | None,
    ) -> None:
        self._done.add(path)
        entry = Entry(b"/".join(path), Kind.DIRECTORY)
        if there is not None:
            entry.mode = stat.S_IMODE(there.mode)
            entry.uid, entry.gid, entry.mtime_ns = there.uid, there.gid, there.mtime_ns
        elif new is not None:
            node, (entry.uid, entry.gid) = new
            entry.mode = stat.S_IMODE(node.mode)
            if self._placing.mode is not None:
                entry.mode = self._placing.mode
            latest = self._placing.latest_ns
            entry.mtime_ns = node.mtime_ns if latest is None else min(node.mtime_ns, latest)
        else:
            entry.mode = 0o755
            entry.uid, entry.gid = self._placing.owner or (0, 0)
            entry.mtime_ns = self._placing.latest_ns or 0
        self._writer.add(entry)

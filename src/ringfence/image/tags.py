"""Names in the store: one small file a name, replaced by renaming, so there is no index to lock."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.errors import FormatError
from ringfence.image import jsonio
from ringfence.image.manifests import Descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Tag", "TagStore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A name and what it stands for.

    Args:
        name: A full reference, or ``sha256:...`` for an image with no name.
        target: The manifest or index.
        tagged_ns: When, in nanoseconds since 1970.
    """

    name: str
    target: Descriptor
    tagged_ns: int

    @property
    def dangling(self) -> bool:
        """Whether the image has no name of its own."""
        return self.name == str(self.target.digest)


class TagStore:
    """The names under one root.

    Args:
        root: The store's directory.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / "tags"
        self._tmp = root / "tmp"

    def _path(self, name: str) -> Path:
        # Names can be longer than a file's name may be.
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.json"

    def set(self, name: str, target: Descriptor) -> Tag:
        """Let `name` stand for `target`."""
        tag = Tag(name=name, target=target, tagged_ns=time.time_ns())
        data = jsonio.dump(
            {"name": name, "target": target.to_json(), "tagged_ns": tag.tagged_ns},
        )
        temporary = self._tmp / f"tag-{os.getpid()}-{tag.tagged_ns}-{self._path(name).stem[:12]}"
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
        temporary.rename(self._path(name))
        return tag

    def get(self, name: str) -> Tag | None:
        """What `name` stands for."""
        return self._read(self._path(name))

    def remove(self, name: str) -> bool:
        """Forget the name; whether there was one."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def __iter__(self) -> Iterator[Tag]:
        """All of them, the newest first."""
        found = [self._read(path) for path in self._folder.glob("*.json")]
        yield from sorted((t for t in found if t is not None), key=lambda t: -t.tagged_ns)

    @staticmethod
    def _read(path: Path) -> Tag | None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        what = f"tag {path}"
        try:
            obj = jsonio.load(data, what)
            return Tag(
                name=jsonio.text(obj, "name", what),
                target=Descriptor.from_json(jsonio.field_map(obj, "target", what), what),
                tagged_ns=jsonio.integer(obj, "tagged_ns", what),
            )
        except FormatError as error:
            raise FormatError(error.message, hint=f"remove it: rm {path}") from error

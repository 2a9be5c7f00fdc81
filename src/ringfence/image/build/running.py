"""What a RUN comes to: its command, what its machine adds to the root, where mounts lead."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError
from ringfence.image.build.configure import DEFAULT_SHELL, command_words

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.image.build.dockerfile import Instruction
    from ringfence.image.build.runner import RunMount
    from ringfence.image.build.state import StageState
    from ringfence.image.build.view import View

__all__ = ["SCRIPT", "Hidden", "command_of", "inside", "place"]

SCRIPT = "/run/ringfence-build"

# What the machine itself puts into a root: never part of a layer.
_OWN = frozenset({b"etc/hostname", b"etc/hosts", b"etc/resolv.conf", b"etc/mtab", b".dockerenv"})
_OWN_FOLDERS = (b"dev/", b"proc/", b"sys/", b"run/ringfence-build")


class Hidden:
    """Names that a command's machine made, not the command."""

    def __init__(self, mounts: list[RunMount], view: View) -> None:
        self._names: set[bytes] = set()
        for mount in mounts:
            parts = view.resolve(mount.target)[0]
            # The place for the mount, and directories that were made on the way to it.
            for count in range(1, len(parts) + 1):
                if view.resolve(os.fsdecode(b"/" + b"/".join(parts[:count])))[1] is None:
                    self._names.add(b"/".join(parts[:count]))
                    break

    def __call__(self, name: bytes) -> bool:
        """Whether the name stays out of the layer."""
        return name in _OWN or name in self._names or name.startswith(_OWN_FOLDERS)


def place(root: Path, mount: RunMount, view: View) -> RunMount:
    """Make the place for a mount where there is none, and name it without links.

    Raises:
        ConfigError: A file is in the way.
    """
    parts, there = view.resolve(mount.target)
    names = [os.fsdecode(part) for part in parts]
    if there is None:
        # Links were resolved in the image's own tree, so none is on the way any more.
        path = root
        for name in names[:-1]:
            path = path / name
            path.mkdir(exist_ok=True)
        path = path / names[-1]
        if mount.source.is_dir():
            path.mkdir(exist_ok=True)
        else:
            path.touch()
    elif (there.children is None) == mount.source.is_dir():
        msg = f"{mount.source} can't be mounted at {mount.target}: one is a file, one a directory"
        raise ConfigError(msg)
    return replace(mount, target="/" + "/".join(names))


def inside(root: Path, path: str) -> Path:
    """A path below a directory, without a link on the way leading out.

    Raises:
        ConfigError: It leads out, or isn't there.
    """
    found = (root / path.lstrip("/")).resolve()
    if not found.is_relative_to(root.resolve()) or not found.exists():
        msg = f"there is no {path} to mount"
        raise ConfigError(msg)
    return found


def command_of(step: Instruction, state: StageState) -> tuple[tuple[str, ...], str]:
    """The words of a RUN, and the script that goes with them."""
    texts = step.heredocs
    if len(texts) == 1 and step.text.startswith("<<") and len(step.text.split()) == 1:
        body = texts[0].text
        if body.startswith("#!"):
            return (f"{SCRIPT}/script",), body
        return (*(state.config.shell or DEFAULT_SHELL), body), ""
    if texts:
        shell = state.config.shell or DEFAULT_SHELL
        whole = step.text + "".join(f"\n{h.text}{h.name}" for h in texts) + "\n"
        return (*shell, whole), ""
    return command_words(step, state), ""

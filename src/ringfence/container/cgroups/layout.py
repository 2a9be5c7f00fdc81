"""What control groups this host has, and where this process is in them.

A host has version 2 alone, version 1 alone, or both: each controller is then in one of them. All
three are served by one rule: every hierarchy that is mounted gets the container's directory, and
each limit goes to the hierarchy that has its controller.

Source: kernel Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst; proc(5), mountinfo.
"""

from __future__ import annotations

import os

from ringfence.container.cgroups import files
from ringfence.errors import HostError

__all__ = ["Hierarchy", "Layout", "detect"]

_OCTAL = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))


class Hierarchy:
    """One mounted hierarchy.

    Args:
        mountpoint: Where it is mounted.
        controllers: Version 1: the controllers, or ``name=...``; version 2: those available.
        own: This process's path in it.
        version: 1 or 2.
        root: The path in the hierarchy that the mountpoint shows.
    """

    __slots__ = ("controllers", "mountpoint", "own", "root", "version")

    def __init__(
        self, mountpoint: str, controllers: list[str], own: str, version: int, root: str
    ) -> None:
        self.mountpoint = mountpoint
        self.controllers = controllers
        self.own = own
        self.version = version
        self.root = root

    def directory(self, path: str) -> str:
        """The directory of a cgroup, given as absolute or as relative to this process's own."""
        if path.startswith("/"):
            return self.mountpoint + path.rstrip("/")
        own = self.own
        if self.root not in {"/", ""} and own.startswith(self.root):
            own = own[len(self.root) :]
        return os.path.normpath(f"{self.mountpoint}/{own}/{path}")


class Layout:
    """All hierarchies of the host."""

    __slots__ = ("hierarchies",)

    def __init__(self, hierarchies: list[Hierarchy]) -> None:
        self.hierarchies = hierarchies

    @property
    def unified(self) -> bool:
        """Version 2 alone."""
        return all(hierarchy.version == 2 for hierarchy in self.hierarchies)

    def of(self, controller: str) -> Hierarchy | None:
        """The hierarchy that has a controller; version 1 has it wherever it is mounted there."""
        for hierarchy in self.hierarchies:
            if controller in hierarchy.controllers:
                return hierarchy
        return None


def _unescape(text: str) -> str:
    if "\\" in text:
        for code, character in _OCTAL:
            text = text.replace(code, character)
    return text


def _own_paths() -> tuple[dict[str, str], str]:
    """Version 1: each controller's path; version 2: the path."""
    first: dict[str, str] = {}
    second = "/"
    for line in files.text_of("/proc/self/cgroup").rstrip("\n").split("\n"):
        _number, controllers, path = line.split(":", 2)
        if controllers:
            first[controllers] = path
        else:
            second = path
    return first, second


def detect() -> Layout:
    """Reads the host's hierarchies from ``/proc``.

    Raises:
        HostError: ``/proc`` can't be read.
    """
    try:
        first, second = _own_paths()
        table = files.text_of("/proc/self/mountinfo")
        lines = [line for line in table.split("\n") if " - cgroup" in line]
        found = [_hierarchy(line, first, second) for line in lines]
    except OSError as error:
        message = f"cannot read which control groups there are: {error.strerror}"
        raise HostError(message, errno=error.errno) from error
    seen: set[str] = set()
    hierarchies = []
    for hierarchy in sorted(filter(None, found), key=lambda item: item.version):
        key = "2" if hierarchy.version == 2 else ",".join(hierarchy.controllers)
        if key not in seen:
            seen.add(key)
            hierarchies.append(hierarchy)
    return Layout(hierarchies)


def _hierarchy(line: str, first: dict[str, str], second: str) -> Hierarchy | None:
    before, _, after = line.partition(" - ")
    kind, _source, options = after.split(" ", 2)
    fields = before.split(" ")
    root, mountpoint = _unescape(fields[3]), _unescape(fields[4])
    if kind == "cgroup2":
        return Hierarchy(mountpoint, _available(mountpoint), second, 2, root)
    names = set(options.strip().split(","))
    for controllers, own in first.items():
        listed = controllers.split(",")
        if names.issuperset(listed):
            return Hierarchy(mountpoint, listed, own, 1, root)
    return None


def _available(mountpoint: str) -> list[str]:
    return files.read(f"{mountpoint}/cgroup.controllers").split()

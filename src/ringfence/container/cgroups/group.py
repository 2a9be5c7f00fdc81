"""One container's control groups: made, limited, joined, frozen, emptied, removed."""

from __future__ import annotations

import errno
import os

from ringfence.container.cgroups import files, limits
from ringfence.container.cgroups.layout import Layout, detect
from ringfence.container.fields import Fields
from ringfence.errors import ConfigError, HostError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Group"]

_EACCES, _EBUSY, _EPERM, _EROFS = 13, 16, 1, 30
# The kernel takes no period with which the present quota would be more than the group above has.
_PERIODS = ("cpu.cfs_period_us", "cpu.rt_period_us")
_DENIED = (_EACCES, _EPERM, _EROFS)
# Without these no process can be put into a version 1 cpuset.
_CPUSET = ("cpuset.cpus", "cpuset.mems")


class Group:
    """The same cgroup in every hierarchy of the host.

    Args:
        directories: One for each hierarchy: controllers, directory, version.
        rootless: What is denied is left out, as far as no limit needs it.
    """

    __slots__ = ("directories", "rootless")

    def __init__(
        self, directories: list[tuple[list[str], str, int]], *, rootless: bool = False
    ) -> None:
        self.directories = directories
        self.rootless = rootless

    @classmethod
    def plan(cls, path: str, *, rootless: bool, layout: Layout | None = None) -> Group:
        """The directories that a cgroup of this path has; nothing is made.

        Args:
            path: Absolute, or relative to this process's own cgroup.
            rootless: Whether what is denied may be missing.
            layout: The host's hierarchies, when they are known already.
        """
        layout = layout or detect()
        found = [
            (hierarchy.controllers, hierarchy.directory(path), hierarchy.version)
            for hierarchy in layout.hierarchies
        ]
        return cls(found, rootless=rootless)

    @property
    def unified(self) -> bool:
        """Version 2 alone."""
        return all(version == 2 for _names, _path, version in self.directories)

    def make(self) -> None:
        """Makes the directories that are missing.

        Raises:
            HostError: The host refused.
        """
        usable = []
        for names, path, version in self.directories:
            try:
                if version == 2:
                    _enable(path)
                _make_directories(path)
                if "cpuset" in names and version == 1:
                    _inherit_cpuset(path)
                usable.append((names, path, version))
            except OSError as error:
                if self.rootless and error.errno in _DENIED:
                    continue
                message = f"cannot make the cgroup {path}: {error.strerror}"
                raise HostError(message, errno=error.errno, path=path) from error
        self.directories = usable

    def directory(self, controller: str) -> str | None:
        """The directory that has a controller."""
        for names, path, _version in self.directories:
            if controller in names:
                return path
        return None

    def limit(self, resources: Fields) -> None:
        """Applies limits; for running containers too.

        Raises:
            ConfigError: Files of version 2 are named and this host has not that alone.
            UnsupportedError: No hierarchy has the controller.
            HostError: The kernel refused a value.
        """
        if resources.mapping("unified") and not self.unified:
            message = "invalid configuration: resources.unified is of version 2 of control groups"
            raise ConfigError(message, hint="say it by memory, cpu, pids, blockIO and so on")
        for version, compile_ in ((1, limits.first_version), (2, limits.second_version)):
            places = {
                name: path
                for names, path, own in self.directories
                if own == version
                for name in names
            }
            if not places:
                continue
            writes = compile_(_with_memory(resources, places) if version == 2 else resources)
            late = []
            for controller, file, value in _ordered(writes, places):
                # A hybrid host has a controller once: the other version's writes aren't for it.
                if controller in places:
                    name, text = limits.where(places[controller], file, value)
                    if not _written(f"{places[controller]}/{name}", text):
                        late.append((f"{places[controller]}/{name}", text))
                elif self._lacks(controller, version):
                    message = f"this host has no cgroup controller {controller!r} to set {file}"
                    raise UnsupportedError(message)
            for path, text in late:
                files.write(path, text)

    def _lacks(self, controller: str, version: int) -> bool:
        other = {"blkio": "io", "io": "blkio"}.get(controller, controller)
        known = {name for names, _path, _version in self.directories for name in names}
        return {controller, other}.isdisjoint(known) and (version == 1 or self.unified)

    def entrance(self) -> dict[str, object]:
        """How a new process gets into it, as a plan says it.

        It moves itself: being moved by another costs a grace period of the kernel's, 15 ms.
        """
        entrance: dict[str, object] = {
            "cgroup_tasks": [
                f"{path}/tasks" for _names, path, version in self.directories if version == 1
            ]
        }
        for _names, path, version in self.directories:
            if version == 2:
                entrance["cgroup_directory"] = path
        return entrance

    def processes(self) -> list[int]:
        """The processes in it and below it."""
        for names, path, _version in self.directories:
            if "hugetlb" in names and len(self.directories) > 1:
                continue
            pids: list[int] = []
            for folder, _below, _files in os.walk(path):
                pids += map(int, files.read(f"{folder}/cgroup.procs").split())
            return sorted(set(pids))
        return []

    def freeze(self, *, frozen: bool) -> None:
        """Stops every process where it is, or lets them go on.

        Raises:
            UnsupportedError: The host has no freezer that this container is in.
            HostError: The kernel refused.
        """
        place = self.directory("freezer")
        if place is not None:
            _freeze_first(place, frozen=frozen)
            return
        for _names, path, version in self.directories:
            if version == 2:
                files.write(f"{path}/cgroup.freeze", int(frozen))
                _await_event(path, "frozen", int(frozen))
                return
        message = "this host has no cgroup freezer, so containers can't be paused"
        raise UnsupportedError(message)

    def frozen(self) -> bool:
        """Whether its processes are stopped."""
        place = self.directory("freezer")
        if place is not None:
            return files.read(f"{place}/freezer.state").strip() in {"FROZEN", "FREEZING"}
        return any(
            files.read(f"{path}/cgroup.freeze").strip() == "1"
            for _names, path, version in self.directories
            if version == 2
        )

    def kill(self, signal: int = 9) -> None:
        """Sends every process a signal; KILL reaches frozen ones too, and those forked meanwhile."""
        if signal == 9:
            for _names, path, version in self.directories:
                if version == 2 and os.path.exists(f"{path}/cgroup.kill") and self.unified:
                    files.write(f"{path}/cgroup.kill", 1)
                    return
        for pid in self.processes():
            try:
                os.kill(pid, signal)
            except ProcessLookupError:
                continue
        if signal == 9 and self.frozen():
            self.freeze(frozen=False)

    def remove(self) -> None:
        """Removes the directories and those below them, once their processes are gone.

        Raises:
            HostError: Processes stay in it.
        """
        for _names, path, _version in self.directories:
            _remove(path)


def _with_memory(resources: Fields, places: dict[str, str]) -> Fields:
    """Limits of memory as version 2 needs them: swap is counted from the limit that there is."""
    if "memory" not in places:
        return Fields({**resources.values, "memory": None}, resources.place)
    memory = resources.table("memory")
    present = files.read_integer(f"{places['memory']}/memory.max")
    if present and memory.integer("swap") > 0 and not memory.integer("limit"):
        completed = {**memory.values, "limit": present}
        return Fields({**resources.values, "memory": completed}, resources.place)
    return resources


def _written(path: str, text: str) -> bool:
    """Writes a value; False for a period that doesn't go with the quota before it is changed too.

    Raises:
        HostError: The kernel refused it otherwise.
    """
    try:
        files.write(path, text)
    except HostError as error:
        if error.errno != errno.EINVAL or not path.endswith(_PERIODS):
            raise
        return False
    return True


def _ordered(writes: list[limits.Write], places: dict[str, str]) -> Iterable[limits.Write]:
    """Memory and swap limits in the order that the present limit demands.

    The limit of both together may never be below that of memory alone, so what grows comes last.
    """
    names = [file for _controller, file, _value in writes]
    memory, both = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    if memory in names and both in names and "memory" in places:
        present = files.read_integer(f"{places['memory']}/{both}")
        wanted = int(writes[names.index(both)][2])
        grows = wanted == -1 or wanted > present
        if grows:
            first, second = names.index(memory), names.index(both)
            writes[first], writes[second] = writes[second], writes[first]
    return writes


def _make_directories(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_directories(os.path.dirname(path))
        os.mkdir(path, 0o755)


def _inherit_cpuset(path: str) -> None:
    """Fills a new cpuset, and those above it that are empty, from the nearest one that isn't."""
    for name in _CPUSET:
        empty = []
        place = path
        while not (value := files.read(f"{place}/{name}").strip()):
            empty.append(place)
            above = os.path.dirname(place)
            if not os.path.exists(f"{above}/{name}"):
                break
            place = above
        for place in reversed(empty):
            files.write(f"{place}/{name}", value)


def _enable(path: str) -> None:
    """Version 2: every controller of a directory above is given on to the one below it."""
    above = os.path.dirname(path)
    chain = []
    while os.path.dirname(above) != above and not os.path.exists(f"{above}/cgroup.controllers"):
        chain.append(above)
        above = os.path.dirname(above)
    # From the mount's root down, as far as it may be written.
    places = []
    place = above
    while os.path.exists(f"{place}/cgroup.controllers"):
        places.append(place)
        place = os.path.dirname(place)
    for place in [*reversed(places), *reversed(chain)]:
        if not os.path.exists(place):
            os.mkdir(place, 0o755)
        _give_on(place)


def _give_on(place: str) -> None:
    offered = set(files.read(f"{place}/cgroup.controllers").split())
    given = set(files.read(f"{place}/cgroup.subtree_control").split())
    for name in sorted(offered - given):
        try:
            files.write(f"{place}/cgroup.subtree_control", f"+{name}")
        except HostError:
            # A cgroup with processes of its own can't give controllers on; a limit that needs
            # one says so when it is set.
            continue


def _pause(attempt: int) -> None:
    import time

    time.sleep(min(0.001 * 2**attempt, 0.1))


def _freeze_first(path: str, *, frozen: bool) -> None:
    wanted = "FROZEN" if frozen else "THAWED"
    for attempt in range(100):
        files.write(f"{path}/freezer.state", wanted)
        if files.read(f"{path}/freezer.state").strip() == wanted:
            return
        # A process may fork while it freezes: thaw and try again, as the kernel's page advises.
        if frozen and attempt % 10 == 9:
            files.write(f"{path}/freezer.state", "THAWED")
        _pause(attempt)
    if frozen:
        files.write(f"{path}/freezer.state", "THAWED")
    message = f"the processes in {path} don't become {wanted}"
    raise HostError(message, path=path)


def _await_event(path: str, name: str, value: int) -> None:
    for attempt in range(100):
        if files.read_table(f"{path}/cgroup.events").get(name) == value:
            return
        _pause(attempt)
    message = f"the processes in {path} don't become {name}={value}"
    raise HostError(message, path=path)


def _remove(path: str) -> None:
    for attempt in range(60):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in _DENIED:
                return
            if error.errno != _EBUSY:
                message = f"cannot remove the cgroup {path}: {error.strerror}"
                raise HostError(message, errno=error.errno, path=path) from error
        else:
            return
        for folder, below, _files in os.walk(path, topdown=False):
            for name in below:
                try:
                    os.rmdir(f"{folder}/{name}")
                except OSError:
                    continue
        _pause(attempt)
    message = f"cannot remove the cgroup {path}: processes stay in it"
    raise HostError(message, errno=_EBUSY, path=path)

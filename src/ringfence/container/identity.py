"""User and group maps: written by root, by the single map, or by ``newuidmap``."""

from __future__ import annotations

import os

from ringfence.container.cgroups import files
from ringfence.errors import HostError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields

__all__ = ["Maps", "own_maps"]

# Inside, outside, count.
Map = tuple[int, int, int]


class Maps:
    """What users and groups of a user namespace are outside.

    Args:
        users: Ranges: first inside, first outside, count.
        groups: Likewise.
    """

    __slots__ = ("groups", "users")

    def __init__(self, users: list[Map], groups: list[Map]) -> None:
        self.users = users
        self.groups = groups

    @classmethod
    def of(cls, linux: Fields) -> Maps:
        """Those of a specification."""
        found: list[list[Map]] = [
            [
                (entry.integer("containerID"), entry.integer("hostID"), entry.integer("size"))
                for entry in linux.tables(name)
            ]
            for name in ("uidMappings", "gidMappings")
        ]
        return cls(found[0], found[1])

    @property
    def has_root(self) -> bool:
        """Whether there is a user 0 inside."""
        return any(inside == 0 and count > 0 for inside, _outside, count in self.users)

    @property
    def sets_groups(self) -> bool:
        """Whether processes inside may set their groups: not with a single map made by a user."""
        return os.geteuid() == 0 or not self._single(self.groups, os.getegid())

    @property
    def many(self) -> bool:
        """Whether there are other users inside than the one who made it."""
        return sum(count for _inside, _outside, count in self.users) > 1

    @staticmethod
    def _single(maps: list[Map], own: int) -> bool:
        return len(maps) == 1 and maps[0][1:] == (own, 1)

    def write(self, pid: int) -> None:
        """Gives a process's user namespace its maps.

        Raises:
            HostError: The host refused.
            NotFoundError: Subordinate IDs are asked for and ``newuidmap`` isn't installed.
        """
        root = os.geteuid() == 0
        if not root and self._single(self.groups, os.getegid()):
            # The kernel's condition for a map without privileges (user_namespaces(7)).
            files.write(f"/proc/{pid}/setgroups", "deny")
        self._write(pid, "gid", self.groups, direct=root or self._single(self.groups, os.getegid()))
        self._write(pid, "uid", self.users, direct=root or self._single(self.users, os.geteuid()))

    @staticmethod
    def _write(pid: int, kind: str, maps: list[Map], *, direct: bool) -> None:
        if direct:
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in maps)
            files.write(f"/proc/{pid}/{kind}_map", text)
            return
        helper = f"new{kind}map"
        for folder in os.get_exec_path():
            path = f"{folder}/{helper}"
            if os.access(path, os.X_OK):
                break
        else:
            message = f"{helper} is needed to map subordinate IDs, and isn't installed"
            raise NotFoundError(message, hint="apt install uidmap")
        numbers = [str(number) for entry in maps for number in entry]
        child = os.posix_spawn(path, [helper, str(pid), *numbers], os.environ)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            message = f"{helper} refused the map {' '.join(numbers)} (exit status {status})"
            hint = "look at /etc/subuid and /etc/subgid: the ranges must be given to this user"
            raise HostError(message, hint=hint)


def own_maps() -> Maps:
    """This user as root inside, with the subordinate IDs that the host has given to it, if any."""
    helpers = all(
        any(os.access(f"{folder}/{name}", os.X_OK) for folder in os.get_exec_path())
        for name in ("newuidmap", "newgidmap")
    )
    maps = [[(0, os.geteuid(), 1)], [(0, os.getegid(), 1)]]
    if helpers:
        for index, path in enumerate(("/etc/subuid", "/etc/subgid")):
            given = _subordinate(path)
            if given is not None:
                maps[index].append((1, *given))
    if len(maps[0]) != len(maps[1]):
        maps = [own[:1] for own in maps]
    return Maps(maps[0], maps[1])


def _subordinate(path: str) -> tuple[int, int] | None:
    import contextlib
    import pwd

    names = {str(os.geteuid())}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(os.geteuid()).pw_name)
    for line in files.read(path).splitlines():
        fields = line.split(":")
        if len(fields) == 3 and fields[0] in names and fields[1].isdigit() and fields[2].isdigit():
            return int(fields[1]), int(fields[2])
    return None

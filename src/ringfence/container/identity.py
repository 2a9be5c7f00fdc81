"""User and group maps: written by root, by the single map, or by ``newuidmap``."""

from __future__ import annotations

import os

from ringfence.container.cgroups import files
from ringfence.errors import HostError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields

__all__ = ["Maps"]

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

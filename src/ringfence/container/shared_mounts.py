"""Containers that make their mounts where the runtime has its own: the host's table must be cleaned.

runc leaves that to whoever asked for such a container.
"""

from __future__ import annotations

import os

from ringfence.container.cgroups import files
from ringfence.errors import HostError

__all__ = ["FILE", "remember", "take_away"]

# In the container's state: the mounts that were there before.
FILE = "mounts"
_DETACH, _NO_FOLLOW = 2, 8
_OCTAL = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))


def _below(rootfs: str) -> dict[str, str]:
    """The mounts at a directory and below it, by their numbers, in the order of mounting."""
    found = {}
    for line in files.text_of("/proc/self/mountinfo").split("\n"):
        fields = line.split(" ")
        if len(fields) > 4:
            place = fields[4]
            for code, character in _OCTAL:
                place = place.replace(code, character)
            if place == rootfs or place.startswith(f"{rootfs}/"):
                found[fields[0]] = place
    return found


def remember(directory: str, rootfs: str) -> None:
    """Writes down what an engine has mounted for the root file system: it stays the engine's."""
    with open(f"{directory}/{FILE}", "w", encoding="ascii") as file:
        file.write(" ".join(_below(rootfs)))


def take_away(directory: str, rootfs: str) -> None:
    """Unmounts what has been mounted since.

    Raises:
        HostError: The kernel refused.
    """
    import ctypes

    path = f"{directory}/{FILE}"
    if not os.path.exists(path):
        return
    known = files.read(path).split()
    libc = ctypes.CDLL(None, use_errno=True)
    for number, place in reversed(_below(rootfs).items()):
        if number not in known and libc.umount2(os.fsencode(place), _DETACH | _NO_FOLLOW):
            refused = ctypes.get_errno()
            message = f"cannot unmount {place}: {os.strerror(refused)}"
            raise HostError(message, errno=refused, path=place)
    os.unlink(path)

"""Files' owners where they can be set, and where they can't."""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringfence.image.tarformat import Entry

__all__ = ["OVERRIDE", "Ownership", "note_owner"]

OVERRIDE = b"user.containers.override_stat"
"""Where owner and mode are kept when they can't be set; what rootless tools of the field use."""


class Ownership(enum.Enum):
    """What becomes of files' owners."""

    KEEP = "keep"
    """Set them: as root, or as root of a user namespace."""
    MINE = "mine"
    """All belong to this user; the owner is noted in an attribute."""

    @classmethod
    def default(cls) -> Ownership:
        """What this process may do."""
        return cls.KEEP if os.geteuid() == 0 else cls.MINE


def note_owner(fd: int, entry: Entry) -> None:
    """Note the owner and the mode of a file that are not a plain file's of root."""
    if entry.uid or entry.gid or entry.mode & 0o7000:
        os.setxattr(fd, OVERRIDE, b"%d:%d:0%o" % (entry.uid, entry.gid, entry.mode))

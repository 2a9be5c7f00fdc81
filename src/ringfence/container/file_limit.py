"""How many files a container's processes may have open."""

from __future__ import annotations

import resource

__all__ = ["file_limit"]

# Soft and hard: what service managers give.
_FILES = (1024, 1 << 19)


def file_limit() -> tuple[int, int, int]:
    """The limit of open files; not more than this process has, since raising takes a privilege."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _FILES[1] if hard < 0 else min(hard, _FILES[1])
    return resource.RLIMIT_NOFILE, min(_FILES[0], most), most

"""Locks between processes: flock on open files, so that a killed process holds nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING

from ringfence.errors import HostError, StateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["locked", "try_lock"]

_STEP_S = 0.02


def try_lock(path: Path, *, shared: bool) -> int | None:
    """Lock the file, which is made when missing, without waiting.

    Returns:
        The descriptor that holds the lock until it and its copies are closed; None if another
        holds it.

    Raises:
        HostError: The file can't be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        msg = f"cannot open the lock {path}: {error.strerror}"
        raise HostError(msg, errno=error.errno, path=str(path)) from error
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            return None
        msg = f"cannot lock {path}: {error.strerror}"
        raise HostError(msg, errno=error.errno, path=str(path)) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def locked(path: Path, *, shared: bool, timeout_s: float | None = None) -> Iterator[int]:
    """Hold the lock for the duration.

    Args:
        path: The lock's file.
        shared: Along with other sharers, or alone.
        timeout_s: How long to wait for it; None waits for ever.

    Raises:
        StateError: Another process held it for that long.
        HostError: The file can't be locked.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while (fd := try_lock(path, shared=shared)) is None:
        if deadline is not None and time.monotonic() >= deadline:
            msg = f"another process uses {path.parent}"
            raise StateError(msg, hint=f"wait for it, or see who: fuser {path}")
        time.sleep(_STEP_S)
    try:
        yield fd
    finally:
        os.close(fd)

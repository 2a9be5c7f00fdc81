"""UNIX sockets in directories whose paths may be longer than a socket's address (108 bytes)."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from ringfence.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["connect", "listen"]


def listen(path: Path, *, backlog: int = 64) -> socket.socket:
    """A socket that listens at ``path``, whose directory is made.

    Raises:
        HostError: It can't be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _through_directory(path, listener.bind)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        message = f"cannot make the socket {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(path)) from error
    return listener


def connect(path: Path, *, timeout_s: float | None = None) -> socket.socket:
    """A connection to the socket at ``path``.

    Raises:
        OSError: Nobody listens there.
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    stream.settimeout(timeout_s)
    try:
        _through_directory(path, stream.connect)
    except OSError:
        stream.close()
        raise
    return stream


def _through_directory(path: Path, act: Callable[[str], None]) -> None:
    """Names the socket by its directory's descriptor, which is short."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        act(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)

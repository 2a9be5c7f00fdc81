"""The process that decides system calls for a container: it is sent the filter's descriptor.

Source: OCI runtime-spec, config-linux.md, "Seccomp" and "The Container Process State".
"""

from __future__ import annotations

import os

from ringfence.container import lean_json
from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields
    from ringfence.container.state import State

__all__ = ["tell"]

_PIDFD_GETFD = 438


def tell(profile: Fields, state: State, pid: int, number: int) -> None:
    """Sends the descriptor to the socket that the profile names.

    Args:
        profile: ``linux.seccomp``.
        state: The container.
        pid: The process that has installed the filter.
        number: The descriptor's number there.

    Raises:
        HostError: It can't be taken from the process, or nobody listens.
    """
    import socket

    path = profile.text("listenerPath")
    document = {
        "ociVersion": "1.2.0",
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": profile.text("listenerMetadata"),
        "state": state.document("running" if pid != state.pid else "creating"),
    }
    taken = _take(pid, number)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            socket.send_fds(connection, [lean_json.dumps(document).encode()], [taken])
    except OSError as error:
        message = f"cannot send the filter's descriptor to {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=path) from error
    finally:
        os.close(taken)


def _take(pid: int, number: int) -> int:
    """A copy of another process's descriptor.

    It can't send it itself: that would take system calls which the listener is to decide.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        taken = int(libc.syscall(_PIDFD_GETFD, process, number, 0))
    finally:
        os.close(process)
    if taken < 0:
        code = ctypes.get_errno()
        message = f"cannot take the filter's descriptor from process {pid}: {os.strerror(code)}"
        raise HostError(message, errno=code)
    return taken

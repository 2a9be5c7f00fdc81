"""The program that sets a container up, as a sealed copy in memory.

Code of the container may get hold of the setup program through ``/proc`` while it runs inside, so
what it gets must not be the host's file: a copy that can't be written any more.
"""

from __future__ import annotations

import os

from ringfence.errors import HostError, NotFoundError

__all__ = ["NAME", "find", "sealed_copy"]

NAME = "ringfence-init"
_TARGET = "x86_64-unknown-linux-musl"
# F_ADD_SEALS: against seals that are taken away, shrinking, growing and writing.
_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4 | 0x8
_ALLOW_SEALING_CLOEXEC = 0x2 | 0x1


def find() -> str:
    """The program's path: ``RINGFENCE_BIN_DIR``, the package, a checkout's build output.

    Raises:
        NotFoundError: It is nowhere.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    checkout = os.path.dirname(os.path.dirname(package))
    target = os.environ.get("CARGO_TARGET_DIR", f"{checkout}/target")
    places = [
        os.environ.get("RINGFENCE_BIN_DIR", ""),
        f"{package}/_bin",
        f"{target}/{_TARGET}/agent",
        f"{target}/{_TARGET}/release",
        f"{target}/{_TARGET}/debug",
    ]
    for place in places:
        path = f"{place}/{NAME}"
        if place and os.access(path, os.X_OK):
            return path
    message = f"the program {NAME} is missing; looked in {', '.join(filter(None, places))}"
    hint = (
        "in a source checkout: make build; else reinstall: pip install --force-reinstall ringfence"
    )
    raise NotFoundError(message, hint=hint)


_copies: dict[tuple[str, int, int], int] = {}


def sealed_copy(path: str) -> int:
    """A descriptor of a program's sealed copy in memory; execute it as ``/proc/self/fd/N``.

    The copy is made once a process and stays open: nobody can change it.

    Raises:
        HostError: There is no memory for it, or the file can't be read.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        message = f"cannot copy {path} into memory: {error.strerror}"
        raise HostError(message, errno=error.errno, path=path) from error
    key = (path, status.st_mtime_ns, status.st_size)
    copy = _copies.get(key, -1)
    if copy < 0:
        copy = _copies.setdefault(key, _copy(path))
    return copy


def _copy(path: str) -> int:
    """A sealed copy.

    Raises:
        HostError: There is no memory for it, or the file can't be read.
    """
    import fcntl

    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            copy = os.memfd_create(NAME, _ALLOW_SEALING_CLOEXEC)
            left = os.fstat(source).st_size
            while left:
                sent = os.sendfile(copy, source, None, left)
                if not sent:
                    break
                left -= sent
            fcntl.fcntl(copy, _ADD_SEALS, _SEALS)
        finally:
            os.close(source)
    except OSError as error:
        message = f"cannot copy {path} into memory: {error.strerror}"
        raise HostError(message, errno=error.errno, path=path) from error
    return copy

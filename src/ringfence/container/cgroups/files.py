"""Reading and writing the kernel's cgroup files."""

from __future__ import annotations

import os

from ringfence.errors import HostError

__all__ = ["read", "read_integer", "read_table", "text_of", "write"]


def write(path: str, value: str | int) -> None:
    """Writes one value.

    Raises:
        HostError: The kernel refused it.
    """
    try:
        number = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(number, str(value).encode())
        finally:
            os.close(number)
    except OSError as error:
        message = f"cannot write {value!r} to {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=path) from error


def read(path: str) -> str:
    """The text of a file; empty where it doesn't exist."""
    try:
        return text_of(path)
    except OSError:
        return ""


def text_of(path: str) -> str:
    """The text of a file.

    Raises:
        OSError: It can't be read.
    """
    # Bare system calls: a container's start reads dozens, and a file object takes nine for each.
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    text = b""
    try:
        while chunk := os.read(number, 65536):
            text += chunk
    finally:
        os.close(number)
    return text.decode(errors="replace")


def read_integer(path: str) -> int:
    """The number in a file; 0 where there is none, and for ``max``."""
    text = read(path).strip()
    return int(text) if text.isdigit() else 0


def read_table(path: str) -> dict[str, int]:
    """A file of ``name number`` lines."""
    table = {}
    for line in read(path).splitlines():
        name, _, value = line.partition(" ")
        if value.strip().lstrip("-").isdigit():
            table[name] = int(value)
    return table

"""The document that a VM process is started with (docs/reference/vm-config.md), and its descriptors."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from ringfence.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

__all__ = ["Document"]

Json = dict[str, object]


class Document:
    """Collects what a VM process is told. A context manager: leaving it closes the descriptors.

    Args:
        name: For log lines.
        engine: ``kvm`` or ``bt``.
        memory_mib: RAM.
        vcpus: Virtual processors.
    """

    def __init__(self, *, name: str, engine: str, memory_mib: int, vcpus: int) -> None:
        self._stack = ExitStack()
        self._fds: list[int] = []
        self._devices: list[Json] = []
        self._fields: Json = {
            "version": 1,
            "name": name,
            "engine": engine,
            "memory_mib": memory_mib,
            "vcpus": vcpus,
        }

    def __enter__(self) -> Self:
        """Nothing happens yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes our copies of the descriptors."""
        self._stack.close()

    def give(self, fd: int) -> int:
        """Hands over a descriptor: it is inherited by the VM process and closed here."""
        self._stack.callback(os.close, fd)
        self._fds.append(fd)
        return fd

    def lend(self, fds: Sequence[int]) -> None:
        """Lets the VM process inherit descriptors that somebody else closes."""
        self._fds.extend(fds)

    def give_file(self, path: Path, flags: int = os.O_RDONLY) -> int:
        """Opens a file and hands it over.

        Raises:
            HostError: It can't be opened.
        """
        try:
            return self.give(os.open(path, flags | os.O_CLOEXEC))
        except OSError as error:
            message = f"cannot open {path}: {error.strerror}"
            raise HostError(message, errno=error.errno, path=str(path)) from error

    def give_bytes(self, name: str, data: bytes) -> int:
        """Hands over a file in memory that holds ``data``."""
        fd = self.give(os.memfd_create(name, os.MFD_CLOEXEC))
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def give_text(self, path: Path, text: str) -> int:
        """Writes a file of the machine's own and hands it over for reading.

        Files that are shared lie on disk: Landlock knows no files in memory.

        Raises:
            HostError: It can't be written.
        """
        try:
            path.write_text(text, errors="surrogateescape")
        except OSError as error:
            message = f"cannot write {path}: {error.strerror}"
            raise HostError(message, errno=error.errno, path=str(path)) from error
        return self.give_file(path)

    def set(self, name: str, value: object) -> None:
        """Sets a field of the document."""
        self._fields[name] = value

    def add_device(self, kind: str, **fields: object) -> None:
        """Adds a device, in the order of their places on the bus."""
        self._devices.append({"type": kind, **fields})

    def add_made_device(self, device: Mapping[str, object]) -> None:
        """Adds a device that somebody else described."""
        self._devices.append(dict(device))

    def finish(self) -> tuple[int, list[int]]:
        """The descriptor of the document, and all that are to be inherited."""
        text = json.dumps({**self._fields, "devices": self._devices})
        return self.give_bytes("config", text.encode()), list(self._fds)

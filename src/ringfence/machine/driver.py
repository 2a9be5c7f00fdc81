"""What an engine gives to a machine: a driver starts it, and what runs is held by this interface.

A driver's module has ``driver() -> Driver``; it is imported when a machine is of its engine, not
before (:mod:`ringfence.machine.engines`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from ringfence.guest.agent import FileInfo, GuestStats
    from ringfence.guest.spec import ExecSpec, InterfaceSpec
    from ringfence.machine.phases import Phases
    from ringfence.machine.spec import MachineSpec
    from ringfence.machine.state import Entry
    from ringfence.network import LinkSpec

__all__ = [
    "AgentLike",
    "Driver",
    "Ending",
    "FilesLike",
    "Place",
    "ProcessLike",
    "Running",
    "RunningInfo",
]


class ProcessLike(Protocol):
    """One command in a machine."""

    @property
    def pid(self) -> int:
        """Its process ID in the machine."""

    @property
    def stdin(self) -> BinaryIO:
        """What it reads; closing it is the end of its input."""

    @property
    def stdout(self) -> BinaryIO:
        """What it writes; with a terminal, all that the terminal shows."""

    @property
    def stderr(self) -> BinaryIO:
        """What it writes there; with a terminal nothing."""

    @property
    def message(self) -> str:
        """Why it didn't start, known after :meth:`wait`."""

    @property
    def timed_out(self) -> bool:
        """It was killed because its time was up, known after :meth:`wait`."""

    def resize(self, columns: int, rows: int) -> None:
        """Its terminal has another size now."""

    def signal(self, number: int) -> None:
        """Sends a signal to it and what it started."""

    def poll(self) -> int | None:
        """Its exit status if it has ended."""

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status; 128 + N when signal N ended it, 126 and 127 as a shell's.

        Raises:
            GuestTimeout: It still runs after that time.
        """

    def communicate(
        self, stdin: bytes = b"", timeout_s: float | None = None
    ) -> tuple[bytes, bytes]:
        """Feeds ``stdin``, closes it and reads both outputs to their ends."""

    def close(self) -> None:
        """Lets go of it; a command that still runs is killed."""


class FilesLike(Protocol):
    """Files in a machine, by absolute paths there."""

    def read(self, path: str) -> bytes:
        """All of a file."""

    def write(
        self,
        path: str,
        data: bytes | Iterable[bytes],
        *,
        mode: int = 0o644,
        append: bool = False,
        user: str = "",
    ) -> int:
        """Writes a file, made if it is missing, and returns how many bytes."""

    def list(self, path: str) -> list[FileInfo]:
        """What is in a directory, by name."""

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """What is at a path."""

    def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Makes a directory."""

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file or directory."""

    def rename(self, source: str, target: str) -> None:
        """Renames within a file system."""

    def tar_in(self, path: str, chunks: Iterable[bytes], *, owner: bool = False) -> None:
        """Unpacks a tar stream into a directory."""

    def tar_out(self, path: str) -> Iterator[bytes]:
        """A file or directory as a tar stream; its members' names begin with its own."""

    def copy_in(self, source: Path, target: str) -> None:
        """Copies a file or directory of the host to the machine's path ``target``."""

    def copy_out(self, source: str, target: Path) -> None:
        """Copies a file or directory of the machine to the host's path ``target``."""


class AgentLike(Protocol):
    """Whoever runs commands and moves files in a machine."""

    @property
    def files(self) -> FilesLike:
        """The machine's files."""

    def exec(self, spec: ExecSpec) -> ProcessLike:
        """Starts a command."""

    def add_interface(self, interface: InterfaceSpec) -> None:
        """Finds a network card that was put in, and sets it up."""

    def remove_interface(self, mac: str) -> None:
        """Lets go of a network card that will be taken out."""

    def stats(self) -> GuestStats:
        """How the machine is doing, as it sees it itself."""

    def power_off(self, *, reboot: bool = False, grace_s: float = 5.0) -> None:
        """Asks the machine to end in good order."""

    def close(self) -> None:
        """Lets go of the machine without ending it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a machine's files and sockets are.

    Args:
        machine_id: Its ID.
        name: Its name.
        folder: For its logs; belongs to it alone.
        sockets: For its sockets; belongs to it alone.
    """

    machine_id: str
    name: str
    folder: Path
    sockets: Path

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """The place of a machine that is written down."""
        record = entry.record
        return cls(machine_id=record.id, name=record.name, folder=entry.path, sockets=entry.sockets)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningInfo:
    """What is known once a machine runs.

    Args:
        engine: What runs it.
        pid: The process that it runs in.
        kernel: Its kernel's version.
        reason: Why this engine was chosen.
    """

    engine: str
    pid: int
    kernel: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a machine ended.

    Args:
        reason: ``poweroff``, ``reboot``, ``panic``, ``crash``, ``killed`` or ``failed``.
        message: In a sentence.
        detail: The end of its logs, when it did not end in good order.
    """

    reason: str
    message: str
    detail: str = ""


class Running(Protocol):
    """A machine that was started."""

    @property
    def agent(self) -> AgentLike:
        """Runs commands in it."""

    @property
    def info(self) -> RunningInfo:
        """What is known of it."""

    def await_ready(self) -> None:
        """Waits until it takes commands, where starting it didn't.

        Raises:
            HostError: It couldn't be set up.
        """

    def pause(self) -> None:
        """Stops it where it is."""

    def resume(self) -> None:
        """Lets it go on."""

    def balloon(self, target_mib: int) -> None:
        """Asks the guest to do without this much of its memory.

        Raises:
            UnsupportedError: Its memory isn't its own.
        """

    def kill(self) -> None:
        """Ends it at once."""

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        """How it ended; None when it still runs after that time."""

    def stats(self, *, engine_counters: bool = False) -> Mapping[str, object]:
        """What it uses of the host."""

    def inspect(self) -> Mapping[str, object]:
        """What it is made of."""

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that it is on."""

    def connect(self, link: LinkSpec) -> Mapping[str, object]:
        """Gives it one more interface; returns what it has there."""

    def disconnect(self, network: str) -> None:
        """Takes its interface on a network away."""

    def close(self) -> None:
        """Ends it if it still runs, and leaves nothing behind."""


class Driver(Protocol):
    """Starts machines of some engines."""

    def start(self, spec: MachineSpec, place: Place, phases: Phases) -> Running:
        """Starts a machine; it takes commands once :meth:`Running.await_ready` has returned.

        Args:
            spec: What it is; its engine is one of this driver's, never ``auto``.
            place: Where its files are.
            phases: Is told how long each part took.

        Raises:
            ConfigError: Something asked for is wrong; nothing was started.
            UnsupportedError: This engine or host can't do it.
            HostError: The host refused.
            GuestError: The guest did not come up.
        """

    def attach(self, place: Place) -> AgentLike:
        """Reaches a machine that another process started.

        Raises:
            StateError: It doesn't answer.
        """

    def clear(self, place: Place) -> None:
        """Removes from the host what a machine has left whose holder died.

        Raises:
            HostError: Something can't be removed yet.
        """

"""The host's end of a guest's agent (docs/reference/agent-protocol.md).

    agent = Agent.accept(handout, connect, timeout_s=30)
    agent.setup(GuestSetup(root=RootSpec.virtiofs("root")))
    process = agent.exec(ExecSpec(argv=("uname", "-r")))
    output, errors = process.communicate()
    assert process.wait() == 0

All of it is synchronous and may be called from any thread. A stream that nobody reads holds up the
command's writing to it and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Self

from ringfence.errors import UnsupportedError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from ringfence.guest.spec import ExecSpec, GuestSetup

__all__ = ["Agent", "FileInfo", "Files", "GuestStats", "RemoteProcess", "connect_vsock"]


def connect_vsock(path: Path, port: int = 1024, *, timeout_s: float = 10.0) -> socket.socket:
    """A connection to a guest's port through the VM process's UNIX socket at ``path``."""
    message = f"not yet: {path} {port} {timeout_s}"
    raise UnsupportedError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What a guest says of a file.

    Args:
        name: Its last part.
        type: ``file``, ``directory``, ``symlink``, ``fifo``, ``socket``, ``block``, ``char``.
        size: Bytes.
        mode: Permission bits.
        uid: Owner.
        gid: Group.
        mtime_ns: Last change, since 1970.
        target: Of a symbolic link.
    """

    name: str
    type: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestStats:
    """How a guest is doing.

    Args:
        uptime_s: Since its kernel started.
        memory_total_bytes: What its kernel has.
        memory_available_bytes: What programs could still get.
        cpu_user_s: Processor time in programs, all processors together.
        cpu_system_s: In its kernel.
        cpu_idle_s: Spent waiting.
        load_1: Load average of the last minute.
        processes: How many there are.
        cpus: Processors that are up.
    """

    uptime_s: float
    memory_total_bytes: int
    memory_available_bytes: int
    cpu_user_s: float
    cpu_system_s: float
    cpu_idle_s: float
    load_1: float
    processes: int
    cpus: int


class RemoteProcess:
    """A command in the guest. A context manager: leaving it closes it, which kills the command.

    ``stdin``, ``stdout`` and ``stderr`` are binary files; with a terminal ``stderr`` is empty.
    ``pid`` is the guest's number, ``message`` says why a command didn't start, ``timed_out``
    whether the guest ended it after its time; both are known after :meth:`wait`.
    """

    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO
    pid: int
    message: str
    timed_out: bool

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code; 128 + N after signal N, 127 and 126 as a shell's. GuestTimeout if it runs."""
        raise NotImplementedError

    def poll(self) -> int | None:
        """The exit code if the command has ended."""
        raise NotImplementedError

    def communicate(
        self, stdin: bytes = b"", timeout_s: float | None = None
    ) -> tuple[bytes, bytes]:
        """Feeds ``stdin``, closes it and reads both outputs to their ends."""
        raise NotImplementedError

    def signal(self, number: int) -> None:
        """Sends a signal to the command's process group."""
        raise NotImplementedError

    def resize(self, columns: int, rows: int) -> None:
        """Tells the command its terminal's new size."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the connection; the guest kills a command that still runs."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Itself."""
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        raise NotImplementedError


class Files:
    """The guest's files. Paths are absolute paths in the guest."""

    def read(self, path: str) -> bytes:
        """The whole content."""
        raise NotImplementedError

    def read_chunks(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> Iterator[bytes]:
        """The content in pieces."""
        raise NotImplementedError

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
        raise NotImplementedError

    def list(self, path: str) -> list[FileInfo]:
        """A directory's entries, by name."""
        raise NotImplementedError

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """What is at a path."""
        raise NotImplementedError

    def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Makes a directory."""
        raise NotImplementedError

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file or directory."""
        raise NotImplementedError

    def rename(self, source: str, target: str) -> None:
        """Renames within a file system."""
        raise NotImplementedError

    def tar_in(self, path: str, chunks: Iterable[bytes], *, owner: bool = False) -> None:
        """Unpacks a tar stream into a directory."""
        raise NotImplementedError

    def tar_out(self, path: str) -> Iterator[bytes]:
        """A file or directory as a tar stream; its members' names begin with its own."""
        raise NotImplementedError

    def copy_in(self, source: Path, target: str) -> None:
        """Copies a file or directory of the host to the guest's path ``target``."""
        raise NotImplementedError

    def copy_out(self, source: str, target: Path) -> None:
        """Copies a file or directory of the guest to the host's path ``target``."""
        raise NotImplementedError


class Agent:
    """A guest's agent. A context manager; closing it doesn't end the guest."""

    files: Files
    kernel: str

    @classmethod
    def accept(
        cls,
        handout: socket.socket,
        connect: Callable[[], socket.socket],
        timeout_s: float,
    ) -> Agent:
        """Waits for the guest's hello on the VM process's ``handout`` socket.

        ``connect`` makes a connection to the guest's port 1024 (:func:`connect_vsock`).
        """
        raise NotImplementedError

    @classmethod
    def attach(cls, connect: Callable[[], socket.socket]) -> Agent:
        """The agent of a guest that another process has set up."""
        raise NotImplementedError

    def setup(self, setup: GuestSetup, timeout_s: float = 60.0) -> dict[str, int]:
        """Sets the guest up and returns how many microseconds each phase took."""
        raise NotImplementedError

    def exec(self, spec: ExecSpec) -> RemoteProcess:
        """Starts a command."""
        raise NotImplementedError

    def stats(self) -> GuestStats:
        """How the guest is doing."""
        raise NotImplementedError

    def sync_time(self) -> float:
        """Sets the guest's clock to the host's; returns by how many seconds it was wrong."""
        raise NotImplementedError

    def power_off(self, *, reboot: bool = False, grace_s: float = 5.0) -> None:
        """Asks the guest to end all commands, write everything back and power off."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the connections."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Itself."""
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        raise NotImplementedError

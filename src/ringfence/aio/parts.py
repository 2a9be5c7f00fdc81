"""What runs in a machine, and its files, for asyncio."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, Self, TypeVar

from ringfence.machine.process import read_some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import TracebackType

    from ringfence.guest.agent import FileInfo
    from ringfence.machine import process as sync_process
    from ringfence.machine.driver import FilesLike

__all__ = ["Files", "Process", "in_thread", "pool"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Commands wait in threads; a program may have this many of them at once.
_THREADS = 128
_CHUNK = 1 << 16

pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ringfence")


async def in_thread(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Calls in a thread of the pool."""
    return await asyncio.get_running_loop().run_in_executor(pool, partial(call, *args, **kwargs))


class Files:
    """The machine's files, by absolute paths there.

    Args:
        files: The machine's own.
    """

    def __init__(self, files: FilesLike) -> None:
        self._files = files

    async def read(self, path: str) -> bytes:
        """All of a file."""
        return await in_thread(self._files.read, path)

    async def write(
        self,
        path: str,
        data: bytes | Iterable[bytes],
        *,
        mode: int = 0o644,
        append: bool = False,
        user: str = "",
    ) -> int:
        """Writes a file, made if it is missing, and returns how many bytes."""
        return await in_thread(self._files.write, path, data, mode=mode, append=append, user=user)

    async def list(self, path: str) -> list[FileInfo]:
        """What is in a directory, by name."""
        return await in_thread(self._files.list, path)

    async def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """What is at a path."""
        return await in_thread(self._files.stat, path, follow=follow)

    async def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Makes a directory."""
        await in_thread(self._files.mkdir, path, mode=mode, parents=parents)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file or directory."""
        await in_thread(self._files.remove, path, recursive=recursive)

    async def rename(self, source: str, target: str) -> None:
        """Renames within a file system."""
        await in_thread(self._files.rename, source, target)

    async def copy_in(self, source: Path, target: str) -> None:
        """Copies a file or directory of the host to the machine's path ``target``."""
        await in_thread(self._files.copy_in, source, target)

    async def copy_out(self, source: str, target: Path) -> None:
        """Copies a file or directory of the machine to the host's path ``target``."""
        await in_thread(self._files.copy_out, source, target)


class Process:
    """A running command. An async context manager: leaving it kills one that still runs.

    Args:
        process: The command.
    """

    def __init__(self, process: sync_process.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process ID in the machine."""
        return self._process.pid

    @property
    def message(self) -> str:
        """Why it could not be started; known once it has ended."""
        return self._process.message

    @property
    def timed_out(self) -> bool:
        """It was killed because its time was up; known once it has ended."""
        return self._process.timed_out

    async def read(self, most: int = _CHUNK) -> bytes:
        """What it has written, waiting for some; empty at the end."""
        return await in_thread(read_some, self._process.stdout, most)

    async def read_error(self, most: int = _CHUNK) -> bytes:
        """Likewise of its standard error."""
        return await in_thread(read_some, self._process.stderr, most)

    async def write(self, data: bytes) -> None:
        """Gives it input, and waits until it has room for it."""
        await in_thread(self._give, data)

    def _give(self, data: bytes) -> None:
        self._process.stdin.write(data)
        self._process.stdin.flush()

    async def close_stdin(self) -> None:
        """Ends its input."""
        await in_thread(self._process.stdin.close)

    async def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status.

        Raises:
            GuestTimeout: It still runs after that time.
            GuestCrash: The machine ended under it.
        """
        return await in_thread(self._process.wait, timeout_s)

    async def communicate(
        self, stdin: bytes = b"", timeout_s: float | None = None
    ) -> tuple[bytes, bytes]:
        """Feeds ``stdin``, closes it and reads both outputs to their ends."""
        return await in_thread(self._process.communicate, stdin, timeout_s)

    async def signal(self, number: int) -> None:
        """Sends a signal to it and what it started."""
        await in_thread(self._process.signal, number)

    async def terminate(self) -> None:
        """Asks it to end (SIGTERM)."""
        await in_thread(self._process.terminate)

    async def kill(self) -> None:
        """Ends it (SIGKILL)."""
        await in_thread(self._process.kill)

    async def resize(self, columns: int, rows: int) -> None:
        """Its terminal has another size now."""
        await in_thread(self._process.resize, columns, rows)

    async def close(self) -> None:
        """Lets go of it."""
        await in_thread(self._process.close)

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets go of it."""
        await self.close()

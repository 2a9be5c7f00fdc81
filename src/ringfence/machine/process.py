"""A command that runs in a machine, as its starter holds it."""

from __future__ import annotations

import io
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Self

from ringfence.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from ringfence.errors import RingfenceError
    from ringfence.machine.driver import ProcessLike

__all__ = ["Process", "read_some"]


def read_some(stream: BinaryIO, most: int) -> bytes:
    """What has come, at most so many bytes, waiting for the first; empty at the end.

    A buffered stream's own ``read`` waits until all of them are there.
    """
    read = stream.read1 if isinstance(stream, io.BufferedIOBase) else stream.read
    return read(most)


class Process:
    """A running command. A context manager: leaving it kills a command that still runs.

    Args:
        process: What the agent gave.
        argv: The command.
        explain: Says why the machine is gone, if it is.
        on_end: Called once, when the command has ended or was let go of.
    """

    def __init__(
        self,
        process: ProcessLike,
        argv: tuple[str, ...],
        explain: Callable[[], RingfenceError | None],
        on_end: Callable[[], None],
    ) -> None:
        self._process = process
        self._explain = explain
        self._on_end: Callable[[], None] | None = on_end
        self.argv = argv

    @property
    def pid(self) -> int:
        """Its process ID in the machine."""
        return self._process.pid

    @property
    def stdin(self) -> BinaryIO:
        """What it reads; closing it is the end of its input."""
        return self._process.stdin

    @property
    def stdout(self) -> BinaryIO:
        """What it writes; with a terminal, all that the terminal shows."""
        return self._process.stdout

    @property
    def stderr(self) -> BinaryIO:
        """What it writes there; with a terminal nothing."""
        return self._process.stderr

    @property
    def message(self) -> str:
        """Why it could not be started; known once it has ended."""
        return self._process.message

    @property
    def timed_out(self) -> bool:
        """It was killed because its time was up; known once it has ended."""
        return self._process.timed_out

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status; 128 + N when signal N ended it, 126 and 127 as a shell's.

        Raises:
            GuestTimeout: It still runs after that time.
            GuestCrash: The machine ended under it.
        """
        with self._explained():
            code = self._process.wait(timeout_s)
        self._ended()
        return code

    def poll(self) -> int | None:
        """Its exit status if it has ended."""
        with self._explained():
            code = self._process.poll()
        if code is not None:
            self._ended()
        return code

    def communicate(
        self, stdin: bytes = b"", timeout_s: float | None = None
    ) -> tuple[bytes, bytes]:
        """Feeds ``stdin``, closes it and reads both outputs to their ends.

        Raises:
            GuestTimeout: It still runs after that time.
            GuestCrash: The machine ended under it.
        """
        with self._explained():
            return self._process.communicate(stdin, timeout_s)

    def signal(self, number: int) -> None:
        """Sends a signal to it and what it started."""
        with self._explained():
            self._process.signal(number)

    def terminate(self) -> None:
        """Asks it to end (SIGTERM)."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it (SIGKILL)."""
        self.signal(signal.SIGKILL)

    def resize(self, columns: int, rows: int) -> None:
        """Its terminal has another size now, in characters."""
        with self._explained():
            self._process.resize(columns, rows)

    def close(self) -> None:
        """Lets go of it; a command that still runs is killed."""
        self._process.close()
        self._ended()

    def _ended(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says that the machine is gone rather than that its agent is silent."""
        try:
            yield
        except (AgentError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            reason = self._explain()
            if reason is None:
                raise
            raise reason from error

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets go of it."""
        self.close()

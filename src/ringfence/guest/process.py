"""A command in the guest, as :class:`subprocess.Popen` shows one on the host."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import threading
import time
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from ringfence.errors import AgentError, GuestTimeout
from ringfence.guest.frames import Connection, Frame, Json, Kind, failure, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.errors import RingfenceError

__all__ = ["WINDOW_BYTES", "RemoteProcess"]

WINDOW_BYTES = 256 << 10
_GRANT_BYTES = WINDOW_BYTES // 4
_SEND_BYTES = 64 << 10
_CREDIT = struct.Struct("<BI")
_NUMBERS = {Kind.STDOUT: 1, Kind.STDERR: 2}


class _Inbox:
    """What has come of one output and isn't read yet."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.window = WINDOW_BYTES
        self.owed = 0

    def put(self, data: bytes) -> None:
        self.window -= len(data)
        if self.window < 0:
            message = "the guest's agent sent more output than it was let"
            raise AgentError(message)
        self.data += data

    def take(self, most: int) -> tuple[bytes, int]:
        """Data, and how much to grant the guest now."""
        data = bytes(memoryview(self.data)[:most])
        del self.data[:most]
        self.owed += len(data)
        if self.owed < _GRANT_BYTES:
            return data, 0
        grant, self.owed = self.owed, 0
        self.window += grant
        return data, grant


class RemoteProcess:
    """A command in the guest. A context manager: leaving it closes it, which kills the command.

    No thread belongs to it: whoever waits for something reads the connection, and what comes for
    others is kept for them. Its methods and streams may be used from several threads.

    Args:
        connection: On which the request has been sent; it is closed with the process.
        terminal: Whether the command has one.
        stdin: Whether it has a standard input.
    """

    def __init__(self, connection: Connection, *, terminal: bool, stdin: bool) -> None:
        self._connection = connection
        self._terminal = terminal
        self._changed = threading.Condition()
        self._pumping = False
        self._closed = False
        self._pid: int | None = None
        self._end: Json | None = None
        self._broken: RingfenceError | None = None
        self._credit = WINDOW_BYTES
        self._stdin_open = stdin
        self._writing = threading.Lock()
        self._inboxes = {Kind.STDOUT: _Inbox(), Kind.STDERR: _Inbox()}
        self.stdin = cast("BinaryIO", _Stdin(self))
        self.stdout: BinaryIO = io.BufferedReader(_Output(self, Kind.STDOUT), _SEND_BYTES)
        self.stderr: BinaryIO = io.BufferedReader(_Output(self, Kind.STDERR), _SEND_BYTES)

    @property
    def pid(self) -> int:
        """The guest's number for the command; 0 when it didn't start."""
        self._pump(lambda: self._pid is not None or self._end is not None, None)
        return self._pid or 0

    @property
    def message(self) -> str:
        """Why the command didn't start; known after :meth:`wait`."""
        return str((self._end or {}).get("message", ""))

    @property
    def timed_out(self) -> bool:
        """Whether the guest killed it after its time; known after :meth:`wait`."""
        return (self._end or {}).get("timed_out") is True

    @property
    def returncode(self) -> int | None:
        """The exit code, if the end has been seen: 128 + N after signal N."""
        if self._end is None:
            return None
        code, signal = self._end.get("code"), self._end.get("signal")
        if isinstance(code, int):
            return code & 0xFF
        return 128 + signal if isinstance(signal, int) else 255

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code; 128 + N after signal N, 127 and 126 as a shell's.

        A command whose output nobody reads waits for that when it has written much.

        Raises:
            GuestTimeout: It still runs.
            AgentError: The guest is gone.
        """
        if not self._pump(lambda: self._end is not None, timeout_s):
            message = f"the command still runs after {timeout_s} s"
            raise GuestTimeout(message)
        code = self.returncode
        return 255 if code is None else code

    def poll(self) -> int | None:
        """The exit code if the command has ended."""
        self._pump(lambda: self._end is not None, 0)
        return self.returncode

    def communicate(
        self, stdin: bytes = b"", timeout_s: float | None = None
    ) -> tuple[bytes, bytes]:
        """Feeds ``stdin``, closes it and reads both outputs to their ends.

        Returns:
            Standard output and standard error.

        Raises:
            GuestTimeout: It still runs; it may be killed or waited for further.
            AgentError: The guest is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        rest = memoryview(stdin)
        collected: dict[Kind, list[bytes]] = {kind: [] for kind in _NUMBERS}
        while True:
            rest = rest[self._send_some(rest) :]
            if not rest:
                self._close_stdin()
            for kind, pieces in collected.items():
                while piece := self._take(kind, WINDOW_BYTES):
                    pieces.append(piece)
            if self._end is not None and not any(box.data for box in self._inboxes.values()):
                return b"".join(collected[Kind.STDOUT]), b"".join(collected[Kind.STDERR])
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._pump(functools.partial(self._is_news, more=bool(rest)), left):
                message = f"the command still runs after {timeout_s} s"
                raise GuestTimeout(message)

    def _is_news(self, *, more: bool) -> bool:
        if self._end is not None or (more and self._credit > 0):
            return True
        return any(box.data for box in self._inboxes.values())

    def signal(self, number: int) -> None:
        """Sends a signal to the command's process group; one that has ended gets none.

        Raises:
            AgentError: The guest is gone.
        """
        self._tell(Kind.SIGNAL, struct.pack("<I", number))

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.signal(9)

    def resize(self, columns: int, rows: int) -> None:
        """Tells the command its terminal's new size.

        Raises:
            AgentError: The guest is gone.
        """
        self._tell(Kind.RESIZE, struct.pack("<HH", columns, rows))

    def _tell(self, kind: Kind, payload: bytes) -> None:
        if self._end is None and not self._closed:
            self._connection.send(kind, payload)

    def close(self) -> None:
        """Ends the connection; the guest kills a command that still runs."""
        self._closed = True
        self._connection.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    # What follows serves the streams.

    def _pump(self, until: Callable[[], bool], timeout_s: float | None) -> bool:
        """Takes frames until something is so; returns whether it is."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not until():
                if self._broken is not None:
                    raise self._broken
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if self._pumping:
                    # Somebody else reads: it may be for us.
                    if left == 0.0:
                        return False
                    self._changed.wait(left)
                    continue
                if not self._pump_one(left):
                    return False
        return True

    def _pump_one(self, timeout_s: float | None) -> bool:
        """Takes one frame, without the lock while waiting; returns whether one came."""
        self._pumping = True
        self._changed.release()
        frame: Frame | None = None
        broken: RingfenceError | None = None
        try:
            frame = self._connection.receive(timeout_s)
        except GuestTimeout:
            pass
        except AgentError as error:
            broken = error
        finally:
            self._changed.acquire()
            self._pumping = False
            self._changed.notify_all()
        try:
            if frame is not None:
                self._dispatch(frame)
        except AgentError as error:
            broken = error
        if broken is not None:
            self._broken = broken
            self._connection.close()
        return frame is not None or broken is not None

    def _dispatch(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.STDOUT | Kind.STDERR:
                self._inboxes[frame.kind].put(frame.payload)
            case Kind.CREDIT if len(frame.payload) == _CREDIT.size:
                self._credit += _CREDIT.unpack(frame.payload)[1]
            case Kind.ANSWER:
                pid = parse(frame.payload).get("pid")
                self._pid = pid if isinstance(pid, int) else 0
            case Kind.EXIT:
                self._end = parse(frame.payload)
                self._connection.close()
            case Kind.ERROR:
                self._broken = failure(frame.payload)
                self._connection.close()
            case kind:
                message = f"the guest's agent broke the protocol: {kind.name} from a command"
                raise AgentError(message)

    def _take(self, kind: Kind, most: int) -> bytes:
        with self._changed:
            data, grant = self._inboxes[kind].take(most)
        if grant and self._end is None and not self._closed:
            self._connection.send(Kind.CREDIT, _CREDIT.pack(_NUMBERS[kind], grant))
        return data

    def _read_output(self, kind: Kind, most: int) -> bytes:
        inbox = self._inboxes[kind]
        self._pump(lambda: bool(inbox.data) or self._end is not None, None)
        return self._take(kind, most)

    def _send_some(self, data: memoryview) -> int:
        """Sends what the guest has room for; returns how much."""
        sent = 0
        with self._writing:
            while sent < len(data):
                with self._changed:
                    count = min(self._credit, _SEND_BYTES, len(data) - sent)
                    self._credit -= count
                if self._end is not None or not self._stdin_open:
                    return len(data)
                if count == 0:
                    break
                self._connection.send(Kind.STDIN, data[sent : sent + count])
                sent += count
        return sent

    def _write_stdin(self, data: memoryview) -> None:
        while True:
            if self._end is not None or not self._stdin_open:
                message = "the command reads no more"
                raise BrokenPipeError(message)
            data = data[self._send_some(data) :]
            if not data:
                return
            self._pump(lambda: self._credit > 0 or self._end is not None, None)

    def _close_stdin(self) -> None:
        with self._writing:
            if not self._stdin_open:
                return
            self._stdin_open = False
        self._tell(Kind.STDIN, b"")


class _Output(io.RawIOBase):
    """Standard output or standard error."""

    def __init__(self, process: RemoteProcess, kind: Kind) -> None:
        self._process = process
        self._kind = kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override] # typeshed's Buffer is 3.12's
        data = self._process._read_output(self._kind, len(buffer))  # noqa: SLF001 - one thing in two classes
        buffer[: len(data)] = data
        return len(data)


class _Stdin(io.RawIOBase):
    """Standard input: nothing is held back, so there is no need to flush."""

    def __init__(self, process: RemoteProcess) -> None:
        self._process = process

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override] # as above
        view = memoryview(data).cast("B")
        self._process._write_stdin(view)  # noqa: SLF001 - one thing in two classes
        return len(view)

    def close(self) -> None:
        if not self.closed:
            super().close()
            # A command that is gone has no input.
            with contextlib.suppress(AgentError):
                self._process._close_stdin()  # noqa: SLF001 - one thing in two classes

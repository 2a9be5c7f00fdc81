"""Connects a command in a machine with this process's terminal and streams."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
import termios
import threading
import tty
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, BinaryIO

from ringfence.errors import RingfenceError
from ringfence.guest.spec import TerminalSize
from ringfence.machine.process import read_some

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from ringfence.machine.process import Process

__all__ = ["attend", "terminal_size", "wants_terminal"]

_CHUNK = 1 << 16
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# So often in a row, an interrupt ends us rather than being passed on.
_INTERRUPTS_TO_LEAVE = 3


def wants_terminal(asked: bool | None) -> bool:  # noqa: FBT001 - three states of one option
    """Whether the command gets a terminal: as asked, else when we have one on both sides."""
    if asked is not None:
        return asked
    return sys.stdin.isatty() and sys.stdout.isatty()


def terminal_size() -> TerminalSize:
    """The size of our terminal; the usual one without any."""
    with suppress(OSError):
        packed = fcntl.ioctl(1, termios.TIOCGWINSZ, bytes(8))
        rows, columns = struct.unpack("HHHH", packed)[:2]
        if rows and columns:
            return TerminalSize(columns=columns, rows=rows)
    return TerminalSize()


def attend(process: Process, *, terminal: bool) -> int:
    """Passes everything between a command and us until it ends, and returns its exit status.

    Raises:
        GuestCrash: The machine ended under it.
        KeyboardInterrupt: It was interrupted again and again.
    """
    with ExitStack() as stack:
        if terminal:
            _enter_raw_mode(stack)
            _follow_size(process, stack)
        else:
            _pass_signals_on(process, stack)
        _start(lambda: _feed(process))
        readers = [
            _start(lambda: _drain(process, process.stdout, 1)),
            _start(lambda: _drain(process, process.stderr, 2)),
        ]
        code = process.wait()
        for reader in readers:
            reader.join()
    if process.message:
        print(f"ringfence: {process.message}", file=sys.stderr)
    if process.timed_out:
        print(f"ringfence: {process.argv[0]} was killed: its time was up", file=sys.stderr)
    return code


def _start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _feed(process: Process) -> None:
    """Our standard input to the command's, until either ends."""
    with suppress(OSError, ValueError, RingfenceError):
        while chunk := os.read(0, _CHUNK):
            process.stdin.write(chunk)
            process.stdin.flush()
    with suppress(OSError, ValueError, RingfenceError):
        process.stdin.close()


def _drain(process: Process, source: BinaryIO, target: int) -> None:
    """The command's output to ours. When nobody reads ours, the command is told as a pipe does."""
    is_read = True
    with suppress(OSError, ValueError, RingfenceError):
        while chunk := read_some(source, _CHUNK):
            if not is_read:
                # The guest tells of a command's end after its output.
                continue
            try:
                _write_all(target, chunk)
            except OSError:
                is_read = False
                process.signal(signal.SIGPIPE)


def _write_all(target: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]


def _enter_raw_mode(stack: ExitStack) -> None:
    if not sys.stdin.isatty():
        return
    before = termios.tcgetattr(0)
    stack.callback(termios.tcsetattr, 0, termios.TCSADRAIN, before)
    tty.setraw(0)


def _follow_size(process: Process, stack: ExitStack) -> None:
    def tell(_number: int) -> None:
        size = terminal_size()
        process.resize(size.columns, size.rows)

    teller = _Teller(tell)
    stack.callback(teller.close)
    _handle(signal.SIGWINCH, lambda number, _frame: teller.put(number), stack)


def _pass_signals_on(process: Process, stack: ExitStack) -> None:
    teller = _Teller(process.signal)
    stack.callback(teller.close)
    interrupts = 0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts >= _INTERRUPTS_TO_LEAVE:
            raise KeyboardInterrupt
        teller.put(number)

    for number in _PASSED_ON:
        _handle(number, pass_on, stack)


class _Teller:
    """Does in a thread what a signal's handler may not: the handler runs amid whatever is locked.

    Args:
        tell: Is called with each number.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._numbers: SimpleQueue[int | None] = SimpleQueue()
        self._thread = _start(self._work)

    def _work(self) -> None:
        while (number := self._numbers.get()) is not None:
            with suppress(RingfenceError, OSError):
                self._tell(number)

    def put(self, number: int) -> None:
        """Adds a number; may be called from a handler."""
        self._numbers.put(number)

    def close(self) -> None:
        """Waits until all is told."""
        self._numbers.put(None)
        self._thread.join(1.0)


def _handle(
    number: signal.Signals, handler: Callable[[int, FrameType | None], None], stack: ExitStack
) -> None:
    before = signal.signal(number, handler)
    stack.callback(signal.signal, number, before)

"""Passes streams, the terminal's size and signals between a program in a machine and this process."""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import struct
import sys
import termios
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from ringfence.errors import RingfenceError
from ringfence.guest.spec import TerminalSize
from ringfence.machine.process import read_some

if TYPE_CHECKING:
    from types import FrameType
    from typing import BinaryIO

    from ringfence.machine.process import Process

__all__ = ["Signals", "attend", "size_of"]

_CHUNK = 1 << 16
# About this process itself, or nobody's to catch.
_OWN = {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGURG, signal.SIGPIPE}


class Signals:
    """Catches every signal and keeps it until there is a program to pass it on to."""

    def __init__(self) -> None:
        self._caught: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in signal.valid_signals() - _OWN:
            with suppress(OSError, ValueError):
                signal.signal(number, self._catch)
        # Whoever started us may have blocked them, so as not to lose any.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        # A handler runs amid whatever is locked: a thread does the rest.
        self._caught.put(number)

    def pass_on(self, process: Process, terminal: int) -> None:
        """Passes them on from now on, those caught before too."""

        def work() -> None:
            while True:
                number = self._caught.get()
                with suppress(RingfenceError, OSError):
                    if number == signal.SIGWINCH and terminal >= 0:
                        size = size_of(terminal)
                        process.resize(size.columns, size.rows)
                    else:
                        process.signal(number)

        threading.Thread(target=work, daemon=True).start()


def size_of(terminal: int) -> TerminalSize:
    """A terminal's size; the usual one where it has none."""
    with suppress(OSError):
        packed = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
        rows, columns = struct.unpack("HHHH", packed)[:2]
        if rows and columns:
            return TerminalSize(columns=columns, rows=rows)
    return TerminalSize()


def attend(process: Process, streams: tuple[int, int, int]) -> int:
    """Passes streams until the program ends; returns its exit status.

    Args:
        process: The program.
        streams: What its standard input, output and error are here.

    Raises:
        GuestCrash: The machine ended under it.
    """
    source, output, errors = streams
    threading.Thread(target=_feed, args=(process, source), daemon=True).start()
    readers = [
        threading.Thread(target=_drain, args=(process, stream, target), daemon=True)
        for stream, target in ((process.stdout, output), (process.stderr, errors))
    ]
    for reader in readers:
        reader.start()
    code = process.wait()
    for reader in readers:
        reader.join()
    if process.message:
        sys.stderr.write(f"{process.message}\n")
    return code


def _feed(process: Process, source: int) -> None:
    with suppress(OSError, ValueError, RingfenceError):
        while chunk := os.read(source, _CHUNK):
            process.stdin.write(chunk)
            process.stdin.flush()
    with suppress(OSError, ValueError, RingfenceError):
        process.stdin.close()


def _drain(process: Process, stream: BinaryIO, target: int) -> None:
    is_read = True
    with suppress(OSError, ValueError, RingfenceError):
        while chunk := read_some(stream, _CHUNK):
            if not is_read:
                # The guest tells of a program's end after its output.
                continue
            try:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(target, rest) :]
            except OSError:
                is_read = False
                process.signal(signal.SIGPIPE)

"""Waiting for a container's process in the foreground, passing signals on to it."""

from __future__ import annotations

import _signal as signals  # type: ignore[import-not-found] # the module around it loads enums
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["Signals", "exit_status"]

# Not passed on: about this process itself, or nobody's to catch.
_OWN = (signals.SIGCHLD, signals.SIGKILL, signals.SIGSTOP, signals.SIGURG)


def exit_status(status: int) -> int:
    """A wait status as shells say it: 128 + N for signal N."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


class Signals:
    """Blocks all signals, so that those for the container wait until it is there."""

    __slots__ = ("_before",)

    def __enter__(self) -> Self:
        """Blocks them."""
        everything = signals.valid_signals()
        self._before = signals.pthread_sigmask(signals.SIG_BLOCK, everything)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the caller's mask back."""
        signals.pthread_sigmask(signals.SIG_SETMASK, self._before)

    def wait(self, pid: int) -> int:
        """Passes signals on until the process ends; returns its exit status."""
        everything = signals.valid_signals()
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done == pid:
                return exit_status(status)
            number = signals.sigwait(everything)
            if number not in _OWN:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue

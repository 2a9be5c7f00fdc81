"""Ends a machine whose time is up: its whole life's, or that without any command."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.machine.spec import Timeouts

__all__ = ["Watch"]


class Watch:
    """Counts commands and watches the clock in a thread, if there is any limit to watch.

    Args:
        timeouts: The limits.
        on_end: Called once with the reason, from the watch's thread.
    """

    def __init__(self, timeouts: Timeouts, on_end: Callable[[str], None]) -> None:
        self._timeouts = timeouts
        self._on_end = on_end
        self._changed = threading.Condition()
        self._began_s = self._idle_since_s = time.monotonic()
        self._commands = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        if timeouts.machine_s is not None or timeouts.idle_s is not None:
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()

    def command_began(self) -> None:
        """A command runs."""
        with self._changed:
            self._commands += 1
            self._changed.notify_all()

    def command_ended(self) -> None:
        """A command has ended."""
        with self._changed:
            self._commands -= 1
            self._idle_since_s = time.monotonic()
            self._changed.notify_all()

    def _next(self) -> tuple[float, str] | None:
        """When the next limit is reached, if nothing changes, and which it is."""
        limits = []
        machine_s, idle_s = self._timeouts.machine_s, self._timeouts.idle_s
        if machine_s is not None:
            limits.append((self._began_s + machine_s, f"its time of {machine_s:g} s was up"))
        if idle_s is not None and self._commands == 0:
            limits.append((self._idle_since_s + idle_s, f"it was idle for {idle_s:g} s"))
        return min(limits, default=None)

    def _watch(self) -> None:
        reason = self._wait_for_limit()
        if reason is not None:
            self._on_end(reason)

    def _wait_for_limit(self) -> str | None:
        with self._changed:
            while not self._closed:
                limit = self._next()
                left = None if limit is None else limit[0] - time.monotonic()
                if limit is not None and left is not None and left <= 0:
                    return limit[1]
                self._changed.wait(left)
        return None

    def close(self) -> None:
        """Watches no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

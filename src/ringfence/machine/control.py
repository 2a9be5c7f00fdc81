"""The host's end of a VM process's control socket (docs/reference/vm-control.md)."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import TYPE_CHECKING

from ringfence.errors import (
    ConfigError,
    FormatError,
    GuestError,
    HostError,
    InternalError,
    RingfenceError,
    StateError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Control", "error_of_kind"]

Json = dict[str, object]

_CLASSES: Mapping[str, type[RingfenceError]] = {
    "config": ConfigError,
    "state": StateError,
    "unsupported": UnsupportedError,
    "host": HostError,
    "guest": GuestError,
    "format": FormatError,
    "internal": InternalError,
}
_MAX_LINE = 4 << 20
_ANSWER_TIMEOUT_S = 30.0


def error_of_kind(kind: str, message: str) -> RingfenceError:
    """The exception for an error that the VM process reports."""
    return _CLASSES.get(kind, InternalError)(message)


class Control:
    """Requests to a VM process, from any thread, and the events that it sends.

    Args:
        stream: Our end of the socket; closing it ends the machine.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._next_id = 1
        self._answers: dict[int, Json] = {}
        self._events: dict[str, Json] = {}
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="vm-control", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        pending = b""
        try:
            while chunk := self._stream.recv(1 << 16):
                pending += chunk
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
                if len(pending) > _MAX_LINE:
                    break
        except (OSError, ValueError):
            pass
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, message: object) -> None:
        if not isinstance(message, dict):
            return
        with self._changed:
            number = message.get("id")
            event = message.get("event")
            if isinstance(number, int):
                self._answers[number] = message
            elif isinstance(event, str):
                self._events[event] = message
            self._changed.notify_all()

    def call(self, method: str, params: Json | None = None, fds: Sequence[int] = ()) -> Json:
        """The result of a request.

        Args:
            method: What is asked for.
            params: Its parameters.
            fds: Descriptors beside it; at most a few.

        Raises:
            StateError: The VM process is gone, or refuses now.
            RingfenceError: It refuses otherwise.
            HostError: It doesn't answer.
        """
        with self._changed:
            number = self._next_id
            self._next_id += 1
            request = {"id": number, "method": method, "params": params or {}}
            try:
                line = json.dumps(request).encode() + b"\n"
                if fds:
                    sent = socket.send_fds(self._stream, [line], list(fds))
                    line = line[sent:]
                self._stream.sendall(line)
            except OSError as error:
                message = f"the machine has ended, so it can't be asked to {method}"
                raise StateError(message) from error
            answered = self._changed.wait_for(
                lambda: number in self._answers or self._ended, _ANSWER_TIMEOUT_S
            )
            answer = self._answers.pop(number, None)
        if answer is None:
            if not answered:
                message = f"the VM process gave no answer to {method} in {_ANSWER_TIMEOUT_S:.0f} s"
                raise HostError(message)
            message = f"the machine ended while it was asked to {method}"
            raise StateError(message)
        error_found = answer.get("error")
        if isinstance(error_found, dict):
            kind, text = str(error_found.get("kind")), str(error_found.get("message"))
            raise error_of_kind(kind, text)
        result = answer.get("result")
        return result if isinstance(result, dict) else {}

    def wait_event(self, *names: str, timeout_s: float | None = None) -> Json | None:
        """The first of these events, now or later; None after that time or at the end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def there() -> bool:
            return self._ended or any(name in self._events for name in names)

        with self._changed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._changed.wait_for(there, left)
            for name in names:
                if name in self._events:
                    return self._events[name]
        return None

    @property
    def ended(self) -> bool:
        """The VM process has closed its end."""
        with self._lock:
            return self._ended

    def close(self) -> None:
        """Closes our end, which ends the machine."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()
        if self._reader is not threading.current_thread():
            self._reader.join(5.0)

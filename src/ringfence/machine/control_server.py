"""A running machine's own control socket: how other processes of this user ask its holder.

JSON lines: ``{"method": "stats"}`` is answered by ``{"result": {...}}`` or by
``{"error": {"class": "StateError", "message": "...", "hint": "..."}}``. Commands and files don't
pass here: they go to the guest's agent directly.
"""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from ringfence import errors
from ringfence.errors import InternalError, RingfenceError, StateError
from ringfence.machine import sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["ControlServer", "call", "error_from", "error_to"]

Json = dict[str, object]

_MAX_LINE = 1 << 16
SOCKET_NAME = "control"


def error_to(error: RingfenceError) -> Json:
    """An error as it crosses between processes."""
    return {"class": type(error).__name__, "message": error.message, "hint": error.hint}


def error_from(written: object) -> RingfenceError:
    """The error that :func:`error_to` wrote."""
    if not isinstance(written, dict):
        return InternalError(f"an answer makes no sense: {written!r}")
    kind = getattr(errors, str(written.get("class")), InternalError)
    message, hint = str(written.get("message")), str(written.get("hint") or "")
    if not (isinstance(kind, type) and issubclass(kind, RingfenceError)):
        kind = InternalError
    if kind is errors.CommandError:
        return errors.GuestError(message, hint=hint)
    return kind(message, hint=hint)


class ControlServer:
    """Answers requests in threads of its own until it is closed.

    Args:
        path: Where it listens.
        methods: What is done for each request.
    """

    def __init__(self, path: Path, methods: Mapping[str, Callable[[Json], Json]]) -> None:
        self._path = path
        self._methods = methods
        self._listener = sockets.listen(path)
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            serve = threading.Thread(target=self._serve, args=(stream,), daemon=True)
            serve.start()

    def _serve(self, stream: socket.socket) -> None:
        with stream, suppress(OSError), stream.makefile("rwb") as lines:
            while line := lines.readline(_MAX_LINE):
                lines.write(json.dumps(self._answer(line), default=str).encode() + b"\n")
                lines.flush()

    def _answer(self, line: bytes) -> Json:
        try:
            request = json.loads(line)
            method = self._methods.get(str(request.get("method")))
        except (ValueError, AttributeError):
            method, request = None, {}
        if method is None:
            return {
                "error": error_to(InternalError("the machine's holder doesn't know this request"))
            }
        try:
            return {"result": method(request)}
        except RingfenceError as error:
            return {"error": error_to(error)}
        except Exception as error:
            return {"error": error_to(InternalError(f"{type(error).__name__}: {error}"))}

    def close(self) -> None:
        """Answers nobody any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)


def call(path: Path, method: str, *, timeout_s: float | None = 30.0, **fields: object) -> Json:
    """Asks a machine's holder.

    Raises:
        StateError: It isn't there.
        RingfenceError: It refuses.
    """
    try:
        with sockets.connect(path, timeout_s=timeout_s) as stream, stream.makefile("rwb") as lines:
            lines.write(json.dumps({"method": method, **fields}).encode() + b"\n")
            lines.flush()
            answer = json.loads(lines.readline())
    except TimeoutError as error:
        message = f"the machine's holder gave no answer to {method} in {timeout_s} s"
        raise StateError(message) from error
    except (OSError, ValueError) as error:
        message = "the machine is not running, or is just ending"
        raise StateError(message) from error
    if "error" in answer:
        raise error_from(answer["error"])
    result = answer.get("result")
    return result if isinstance(result, dict) else {}

"""Frames over a stream socket: a length (u32, little-endian), a kind (u8), the payload.

The guest is not trusted: lengths, kinds and JSON are checked before anything is kept.
"""

from __future__ import annotations

import contextlib
import enum
import json
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.errors import (
    AgentError,
    ConfigError,
    GuestError,
    GuestTimeout,
    StateError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.errors import RingfenceError

__all__ = ["MAX_PAYLOAD_BYTES", "Connection", "Frame", "Json", "Kind", "failure", "parse"]

MAX_PAYLOAD_BYTES = 1 << 20
_HEADER = struct.Struct("<IB")
_READ_BYTES = 256 << 10

Json = dict[str, object]


class Kind(enum.IntEnum):
    """What a frame is (docs/reference/agent-protocol.md)."""

    HELLO = 1
    SETUP = 2
    READY = 3
    REQUEST = 4
    ANSWER = 5
    ERROR = 6
    DATA = 7
    STDIN = 16
    STDOUT = 17
    STDERR = 18
    CREDIT = 19
    SIGNAL = 20
    RESIZE = 21
    EXIT = 22


_KINDS = {kind.value: kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: what it is, and at most :data:`MAX_PAYLOAD_BYTES`."""

    kind: Kind
    payload: bytes


class Connection:
    """Frames on a connected socket, which it owns.

    One thread may receive while others send.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, kind: Kind, payload: bytes | bytearray | memoryview = b"") -> None:
        """Sends a frame, waiting while the guest takes nothing.

        Raises:
            AgentError: The connection is gone.
        """
        try:
            with self._sending:
                self._sock.sendall(_HEADER.pack(len(payload), kind) + payload)
        except OSError as error:
            message = f"cannot send to the guest's agent: {error.strerror}"
            raise AgentError(message) from error

    def send_json(self, kind: Kind, value: Mapping[str, object]) -> None:
        """Sends a frame of JSON.

        Raises:
            AgentError: The connection is gone.
            ConfigError: It is too long for a frame.
        """
        payload = json.dumps(value).encode()
        if len(payload) > MAX_PAYLOAD_BYTES:
            message = f"a request of {len(payload)} bytes is longer than {MAX_PAYLOAD_BYTES}"
            raise ConfigError(message, hint="pass long data by standard input or a file")
        self.send(kind, payload)

    def receive(self, timeout_s: float | None = None) -> Frame:
        """Waits for a frame.

        Raises:
            AgentError: The connection is gone, or the guest broke the protocol.
            GuestTimeout: Nothing came.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            frame = self._next()
            if frame is not None:
                return frame
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._fill(left)

    def _next(self) -> Frame | None:
        if len(self._buffer) < _HEADER.size:
            return None
        length, number = _HEADER.unpack_from(self._buffer)
        kind = _KINDS.get(number)
        if length > MAX_PAYLOAD_BYTES or kind is None:
            message = f"the guest's agent broke the protocol: kind {number}, {length} bytes"
            raise AgentError(message)
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        return Frame(kind, payload)

    def _fill(self, timeout_s: float | None) -> None:
        try:
            if timeout_s is not None:
                poll = select.poll()
                poll.register(self._sock, select.POLLIN)
                if not poll.poll(timeout_s * 1000):
                    message = "the guest's agent took too long to answer"
                    raise GuestTimeout(message)
            chunk = self._sock.recv(_READ_BYTES)
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            message = f"the connection to the guest's agent failed: {error}"
            raise AgentError(message) from error
        if not chunk:
            message = "the guest's agent closed the connection"
            raise AgentError(message)
        self._buffer += chunk

    def close(self) -> None:
        """Ends the connection; whoever waits on it is woken."""
        # It may be gone already.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def parse(payload: bytes) -> Json:
    """A payload's JSON object.

    Raises:
        AgentError: It is none.
    """
    try:
        value: object = json.loads(payload)
    except (ValueError, RecursionError) as error:
        message = f"the guest's agent broke the protocol: {error}"
        raise AgentError(message) from error
    if not isinstance(value, dict):
        message = "the guest's agent broke the protocol: no JSON object"
        raise AgentError(message)
    return value


def failure(payload: bytes) -> RingfenceError:
    """The exception for an ``error`` frame."""
    value = parse(payload)
    message = str(value.get("message", ""))[:4096] or "the guest's agent failed"
    match value.get("kind"):
        case "config":
            return ConfigError(message)
        case "state":
            return StateError(message)
        case "unsupported":
            return UnsupportedError(message)
        case _:
            return GuestError(message)

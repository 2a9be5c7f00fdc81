"""Messages of the domain name system, and how others are asked, for :mod:`ringfence.network._names_server`.

Source: RFC 1035, RFC 7766.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct

__all__ = [
    "AAAA",
    "PORT",
    "A",
    "MalformedError",
    "addresses",
    "ask_datagram",
    "ask_stream",
    "has",
    "question",
    "read_name",
    "reply",
]

A, AAAA = 1, 28
PORT = 53


class MalformedError(ValueError):
    """A message that is none."""


def read_name(message: bytes, at: int) -> tuple[str, int]:
    """The name at a place in a message, and where it ends.

    Raises:
        MalformedError: It is.
    """
    labels: list[str] = []
    end, jumps = 0, 0
    while True:
        if at >= len(message):
            raise MalformedError
        size = message[at]
        if size >= 0xC0:
            if at + 1 >= len(message) or jumps > 32:
                raise MalformedError
            end = end or at + 2
            at, jumps = (size & 0x3F) << 8 | message[at + 1], jumps + 1
            continue
        if size > 63 or at + 1 + size > len(message):
            raise MalformedError
        at += 1 + size
        if not size:
            return ".".join(labels).lower(), end or at
        labels.append(message[at - size : at].decode("latin-1"))
        if len(labels) > 127:
            raise MalformedError


def question(message: bytes) -> tuple[str, int, int]:
    """The name, the type and the end of a message's one question.

    Raises:
        MalformedError: It is.
    """
    if len(message) < 17 or struct.unpack_from(">H", message, 4)[0] != 1:
        raise MalformedError
    name, end = read_name(message, 12)
    if end + 4 > len(message):
        raise MalformedError
    return name, struct.unpack_from(">H", message, end)[0], end + 4


def addresses(message: bytes) -> list[tuple[str, int]]:
    """The addresses in an answer, with how long they hold in seconds.

    Raises:
        MalformedError: It is.
    """
    found = []
    _, _, at = question(message)
    for _ in range(struct.unpack_from(">H", message, 6)[0]):
        _, at = read_name(message, at)
        if at + 10 > len(message):
            raise MalformedError
        kind, _, ttl, size = struct.unpack_from(">HHIH", message, at)
        data = message[at + 10 : at + 10 + size]
        at += 10 + size
        if (kind, len(data)) in ((A, 4), (AAAA, 16)):
            found.append((str(ipaddress.ip_address(data)), ttl))
    return found


def reply(query: bytes, end: int, code: int, records: bytes = b"", count: int = 0) -> bytes:
    """An answer of our own to a query whose question ends there."""
    flags = 0x8080 | (query[2] << 8 & 0x0100) | code
    return query[:2] + struct.pack(">HHHHH", flags, 1, count, 0, 0) + query[12:end] + records


def has(domain: str, name: str) -> bool:
    """Whether a rule's domain is about a name."""
    if domain.startswith("*."):
        return name.endswith(domain[1:]) and len(name) > len(domain) - 1
    return name == domain


class _Heard(asyncio.DatagramProtocol):
    def __init__(self, future: asyncio.Future[bytes]) -> None:
        self._future = future

    def datagram_received(self, data: bytes, _: object) -> None:
        if not self._future.done():
            self._future.set_result(data)

    def error_received(self, error: Exception) -> None:
        if not self._future.done():
            self._future.set_exception(error)


async def ask_datagram(server: str, query: bytes) -> bytes:
    """What a server answers by UDP."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[bytes] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Heard(heard), remote_addr=(server, PORT)
    )
    try:
        transport.sendto(query)
        return await heard
    finally:
        transport.close()


async def ask_stream(server: str, query: bytes) -> bytes:
    """What a server answers by TCP."""
    reader, writer = await asyncio.open_connection(server, PORT)
    try:
        writer.write(struct.pack(">H", len(query)) + query)
        size = struct.unpack(">H", await reader.readexactly(2))[0]
        return await reader.readexactly(size)
    finally:
        writer.close()

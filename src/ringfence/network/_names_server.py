"""Run as a program: the name server of a network of the host's kernel that has rules about names.

It answers the network's own names, refuses what no rule lets a machine reach, and asks the host's
name servers for the rest. Addresses that it answers for a name that a rule is about go into that
rule's set of the packet filter before the machine hears of them, so that the rule holds for them.

Uses nothing but the standard library, so that it starts fast and stays small.
Source: RFC 1035, RFC 7766; ``nft(8)``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time

_PORT = 53
_ASK_TIMEOUT_S = 3.0
_IDLE_S = 10.0
_MAX_ASKED = 512
_MAX_STREAMS = 128
_MAX_MESSAGE = 65535
_REFUSED, _FAILED = 5, 2
_A, _AAAA = 1, 28
_TTL_S = 5
# Programs keep addresses longer than they should.
_LEAST_S, _MOST_S = 300, 86400
_KEPT_REFUSALS = 256

Json = dict[str, object]


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
        if (kind, len(data)) in ((_A, 4), (_AAAA, 16)):
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


class Names:
    """What is answered, refused and asked for."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pinned: dict[tuple[str, str], float] = {}
        self._refused: list[Json] = []
        self._written = 0.0
        self._asked = 0
        self._config: dict[str, object] = {}
        self.load()

    def load(self) -> None:
        """Reads its configuration again."""
        with open(os.path.join(self._folder, "names.json"), encoding="utf-8") as file:  # noqa: PTH118, PTH123
            self._config = json.load(file)
        # Sets of rules that are no more were taken away with what was in them.
        self._pinned.clear()

    def listening(self) -> list[str]:
        """The addresses that it serves."""
        return self._list("listen")

    def _list(self, key: str) -> list[str]:
        found = self._config.get(key)
        return found if isinstance(found, list) else []

    def _map(self, key: str) -> dict[str, object]:
        found = self._config.get(key)
        return found if isinstance(found, dict) else {}

    def _policies(self, source: str) -> list[dict[str, object]]:
        keys = ["net", self._map("machines").get(source)]
        found = [self._map("policies").get(str(key)) for key in keys if key]
        return [one for one in found if isinstance(one, dict)]

    def _why_not(self, source: str, name: str) -> str | None:
        for policy in self._policies(source):
            rules = policy["rules"]
            about = [rule for rule in rules if has(rule["domain"], name)]  # type: ignore[attr-defined]
            if any(rule["action"] == "deny" and not rule["narrow"] for rule in about):
                return "denied"
            allowed = any(rule["action"] == "allow" for rule in about)
            if policy["closed"] and not allowed:
                return "not-allowed"
        return None

    async def answer(self, query: bytes, source: str, *, stream: bool) -> bytes | None:
        """The answer to a query; None for what deserves none."""
        try:
            name, kind, end = question(query)
        except (ValueError, struct.error):
            return None
        # An answer, or another kind of question.
        if query[2] & 0xF8:
            return None
        own = self._map("names").get(name)
        if isinstance(own, list):
            return self._own(query, kind, end, own)
        reason = self._why_not(source, name)
        if reason is not None:
            self._refuse(source, name, reason)
            return reply(query, end, _REFUSED)
        if self._asked >= _MAX_ASKED:
            return None
        self._asked += 1
        try:
            heard = await self._ask(query, end, source, stream=stream)
            if heard is not None:
                await self._pin(source, name, addresses(heard))
        except (ValueError, struct.error, OSError):
            heard = None
        finally:
            self._asked -= 1
        return heard or reply(query, end, _FAILED)

    @staticmethod
    def _own(query: bytes, kind: int, end: int, own: list[str]) -> bytes:
        records = b""
        count = 0
        for text in own:
            packed = ipaddress.ip_address(text).packed
            if kind == (_A if len(packed) == 4 else _AAAA):
                records += struct.pack(">HHHIH", 0xC00C, kind, 1, _TTL_S, len(packed)) + packed
                count += 1
        return reply(query, end, 0, records, count)

    async def _ask(self, query: bytes, end: int, source: str, *, stream: bool) -> bytes | None:
        own = self._map("servers_of").get(source)
        servers = own if isinstance(own, list) else self._list("servers")
        fresh = secrets.token_bytes(2)
        sent = fresh + query[2:]
        for server in servers:
            try:
                asking = _ask_stream if stream else _ask_datagram
                heard = await asyncio.wait_for(asking(server, sent), _ASK_TIMEOUT_S)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                continue
            # Somebody else's answer names another question.
            if heard[:2] == fresh and heard[12:end].lower() == query[12:end].lower():
                return query[:2] + heard[2:]
        return None

    async def _pin(self, source: str, name: str, found: list[tuple[str, int]]) -> None:
        now = time.monotonic()
        lines = []
        for policy in self._policies(source):
            for rule in policy["rules"]:  # type: ignore[attr-defined]
                if not has(rule["domain"], name):
                    continue
                for address, ttl in found:
                    keep = min(max(ttl, _LEAST_S), _MOST_S)
                    where = f"{rule['pins']}_{6 if ':' in address else 4}"
                    if self._pinned.get((where, address), 0.0) >= now + keep / 2:
                        continue
                    element = f"element inet {self._config['table']} {where}"
                    timed = f"add {element} {{ {address} timeout {keep}s }}"
                    # An element that is there keeps its time unless it is taken away first.
                    lines += [timed, f"delete {element} {{ {address} }}", timed]
                    self._pinned[where, address] = now + keep
        if len(self._pinned) > 1 << 16:
            self._pinned.clear()
        if lines:
            await self._filter("\n".join(lines) + "\n")

    async def _filter(self, script: str) -> None:
        program = await asyncio.create_subprocess_exec(
            str(self._config["nft"]), "-f", "-", stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        await program.communicate(script.encode())
        if program.returncode:
            self._pinned.clear()
            raise OSError(program.returncode, "the packet filter refuses an address")

    def _refuse(self, source: str, name: str, reason: str) -> None:
        for one in self._refused:
            if (one["address"], one["destination"], one["reason"]) == (source, name, reason):
                one["time"], one["packets"] = time.time(), int(str(one["packets"])) + 1
                break
        else:
            fields = {"address": source, "transport": "dns", "destination": name, "reason": reason}
            self._refused.append({"time": time.time(), **fields, "packets": 1})
            del self._refused[:-_KEPT_REFUSALS]
            sys.stderr.write(f"{source} asked for {name!r}: {reason}\n")
        if time.monotonic() - self._written > 1.0:
            self.write_refusals()
        else:
            asyncio.get_running_loop().call_later(1.0, self.write_refusals)

    def write_refusals(self) -> None:
        """Writes down what was refused, for others to see."""
        self._written = time.monotonic()
        path = os.path.join(self._folder, "names-refused.json")  # noqa: PTH118
        with open(path + ".new", "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(self._refused, file)
        os.replace(path + ".new", path)  # noqa: PTH105


class _Heard(asyncio.DatagramProtocol):
    def __init__(self, future: asyncio.Future[bytes]) -> None:
        self._future = future

    def datagram_received(self, data: bytes, _: object) -> None:
        if not self._future.done():
            self._future.set_result(data)

    def error_received(self, error: Exception) -> None:
        if not self._future.done():
            self._future.set_exception(error)


async def _ask_datagram(server: str, query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[bytes] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Heard(heard), remote_addr=(server, _PORT)
    )
    try:
        transport.sendto(query)
        return await heard
    finally:
        transport.close()


async def _ask_stream(server: str, query: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(server, _PORT)
    try:
        writer.write(struct.pack(">H", len(query)) + query)
        size = struct.unpack(">H", await reader.readexactly(2))[0]
        return await reader.readexactly(size)
    finally:
        writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, names: Names) -> None:
        self._names = names
        self._jobs: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        if len(self._jobs) < 2 * _MAX_ASKED:
            job = asyncio.ensure_future(self._serve(data, peer))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)

    async def _serve(self, data: bytes, peer: tuple[str, int]) -> None:
        answer = await self._names.answer(data, peer[0], stream=False)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, peer)


class _Streams:
    def __init__(self, names: Names) -> None:
        self._names = names
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = str(writer.get_extra_info("peername")[0])
        self._open += 1
        try:
            while self._open <= _MAX_STREAMS:
                head = await asyncio.wait_for(reader.readexactly(2), _IDLE_S)
                size = struct.unpack(">H", head)[0]
                query = await asyncio.wait_for(reader.readexactly(size), _IDLE_S)
                answer = await self._names.answer(query, peer, stream=True)
                if answer is None or len(answer) > _MAX_MESSAGE:
                    break
                writer.write(struct.pack(">H", len(answer)) + answer)
                await asyncio.wait_for(writer.drain(), _IDLE_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open -= 1
            writer.close()


async def serve(names: Names, ready: int) -> None:
    """Serves until it is ended."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, names.load)
    streams = _Streams(names)
    servers = []
    for address in names.listening():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        await loop.create_datagram_endpoint(
            lambda: _Datagrams(names), local_addr=(address, _PORT), family=family
        )
        servers.append(await asyncio.start_server(streams.serve, address, _PORT, limit=1 << 17))
    os.write(ready, b"x")
    os.close(ready)
    await asyncio.Event().wait()


def main() -> None:
    """Serves the network whose directory is its first argument."""
    names = Names(sys.argv[1])
    asyncio.run(serve(names, int(sys.argv[2])))


if __name__ == "__main__":
    main()

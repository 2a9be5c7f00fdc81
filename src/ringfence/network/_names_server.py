"""Run as a program: the name server of a network of the host's kernel that has rules about names.

It answers the network's own names, refuses what no rule lets a machine reach, and asks the host's
name servers for the rest. Addresses that it answers for a name that a rule is about go into that
rule's set of the packet filter before the machine hears of them, so that the rule holds for them.

Where the packet filter tells machines by their links (on a LAN), each comes by a door: a port of
the host's address that nothing but its link leads to.

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
import struct
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from ringfence.network import _names_messages as dns
else:
    # The program is a file, not part of the package, which would take longer to import.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    import _names_messages as dns

_ASK_TIMEOUT_S = 3.0
_IDLE_S = 10.0
_MAX_ASKED, _MAX_ASKED_BY_ONE = 512, 128
_MAX_STREAMS = 128
_MAX_MESSAGE = 65535
_REFUSED, _FAILED = 5, 2
_TTL_S = 5
# Programs keep addresses longer than they should.
_LEAST_S, _MOST_S = 300, 86400
_KEPT_REFUSALS = 256

Json = dict[str, object]


class Names:
    """What is answered, refused and asked for."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pinned: dict[tuple[str, str], float] = {}
        self._refused: list[Json] = []
        self._written = 0.0
        self._asked: dict[str, int] = {}
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

    def doors(self) -> dict[str, list[str]]:
        """By each machine that comes by sockets of its own, the addresses that these are at."""
        return self._map("doors")  # type: ignore[return-value]

    def write_doors(self, found: dict[str, list[str]]) -> None:
        """Writes down which ports the doors have, and of which configuration that is true."""
        self._write("names-doors.json", {"token": self._config.get("token"), "doors": found})

    def _write(self, name: str, document: object) -> None:
        path = os.path.join(self._folder, name)  # noqa: PTH118
        with open(path + ".new", "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(document, file)
        os.replace(path + ".new", path)  # noqa: PTH105

    def _list(self, key: str) -> list[str]:
        found = self._config.get(key)
        return found if isinstance(found, list) else []

    def _map(self, key: str) -> dict[str, object]:
        found = self._config.get(key)
        return found if isinstance(found, dict) else {}

    def _policies(self, who: str) -> list[dict[str, object]]:
        keys = ["net", self._map("machines").get(who)]
        found = [self._map("policies").get(str(key)) for key in keys if key]
        return [one for one in found if isinstance(one, dict)]

    def _why_not(self, who: str, name: str) -> str | None:
        for policy in self._policies(who):
            rules = policy["rules"]
            about = [rule for rule in rules if dns.has(rule["domain"], name)]  # type: ignore[attr-defined]
            if any(rule["action"] == "deny" and not rule["narrow"] for rule in about):
                return "denied"
            allowed = any(rule["action"] == "allow" for rule in about)
            if policy["closed"] and not allowed:
                return "not-allowed"
        return None

    async def answer(
        self, query: bytes, source: str, *, stream: bool, door: str = ""
    ) -> bytes | None:
        """The answer to a query; None for what deserves none.

        Args:
            query: It.
            source: The address that it is from.
            stream: It came by TCP.
            door: The machine whose door it came by.
        """
        who = door or source
        try:
            name, kind, end = dns.question(query)
        except (ValueError, struct.error):
            return None
        # An answer, or another kind of question.
        if query[2] & 0xF8:
            return None
        own = self._map("names").get(name)
        if isinstance(own, list):
            with suppress(OSError):
                await self._pin(who, name, [(str(one), _LEAST_S) for one in own])
            return self._own(query, kind, end, own)
        reason = self._why_not(who, name)
        if reason is not None:
            self._refuse(source, door, name, reason)
            return dns.reply(query, end, _REFUSED)
        asked = self._asked.get(who, 0)
        if asked >= _MAX_ASKED_BY_ONE or sum(self._asked.values()) >= _MAX_ASKED:
            return None
        self._asked[who] = asked + 1
        try:
            heard = await self._ask(query, end, who, stream=stream)
            if heard is not None:
                await self._pin(who, name, dns.addresses(heard))
        except (ValueError, struct.error, OSError):
            heard = None
        finally:
            self._asked[who] -= 1
            if not self._asked[who]:
                del self._asked[who]
        return heard or dns.reply(query, end, _FAILED)

    @staticmethod
    def _own(query: bytes, kind: int, end: int, own: list[str]) -> bytes:
        records = b""
        count = 0
        for text in own:
            packed = ipaddress.ip_address(text).packed
            if kind == (dns.A if len(packed) == 4 else dns.AAAA):
                records += struct.pack(">HHHIH", 0xC00C, kind, 1, _TTL_S, len(packed)) + packed
                count += 1
        return dns.reply(query, end, 0, records, count)

    async def _ask(self, query: bytes, end: int, who: str, *, stream: bool) -> bytes | None:
        own = self._map("servers_of").get(who)
        servers = own if isinstance(own, list) else self._list("servers")
        fresh = secrets.token_bytes(2)
        sent = fresh + query[2:]
        for server in servers:
            try:
                asking = dns.ask_stream if stream else dns.ask_datagram
                heard = await asyncio.wait_for(asking(server, sent), _ASK_TIMEOUT_S)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                continue
            # Somebody else's answer names another question.
            if heard[:2] == fresh and heard[12:end].lower() == query[12:end].lower():
                return query[:2] + heard[2:]
        return None

    async def _pin(self, who: str, name: str, found: list[tuple[str, int]]) -> None:
        now = time.monotonic()
        lines = []
        for policy in self._policies(who):
            for rule in policy["rules"]:  # type: ignore[attr-defined]
                if not dns.has(rule["domain"], name):
                    continue
                for address, ttl in found:
                    keep = min(max(ttl, _LEAST_S), _MOST_S)
                    where = f"{rule['pins']}_{6 if ':' in address else 4}"
                    if self._pinned.get((where, address), 0.0) >= now + keep / 2:
                        continue
                    element = f"element {self._config['family']} {self._config['table']} {where}"
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

    def _refuse(self, source: str, door: str, name: str, reason: str) -> None:
        for one in self._refused:
            if (one["address"], one["destination"], one["reason"]) == (source, name, reason):
                one["time"], one["packets"] = time.time(), int(str(one["packets"])) + 1
                break
        else:
            fields = {"address": source, "transport": "dns", "destination": name, "reason": reason}
            if door:
                fields["port"] = door
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
        self._write("names-refused.json", self._refused)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, names: Names, door: str) -> None:
        self._names = names
        self._door = door
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
        answer = await self._names.answer(data, peer[0], stream=False, door=self._door)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, peer)


class _Streams:
    def __init__(self, names: Names, door: str) -> None:
        self._names = names
        self._door = door
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = str(writer.get_extra_info("peername")[0])
        self._open += 1
        try:
            while self._open <= _MAX_STREAMS:
                head = await asyncio.wait_for(reader.readexactly(2), _IDLE_S)
                size = struct.unpack(">H", head)[0]
                query = await asyncio.wait_for(reader.readexactly(size), _IDLE_S)
                answer = await self._names.answer(query, peer, stream=True, door=self._door)
                if answer is None or len(answer) > _MAX_MESSAGE:
                    break
                writer.write(struct.pack(">H", len(answer)) + answer)
                await asyncio.wait_for(writer.drain(), _IDLE_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open -= 1
            writer.close()


class _Listening:
    """An address that is served, by both transports at one port; any that is free when 0."""

    def __init__(self, stream: asyncio.Server, datagrams: asyncio.BaseTransport) -> None:
        self._served = (stream, datagrams)
        self.port = int(stream.sockets[0].getsockname()[1])

    @classmethod
    async def start(cls, names: Names, address: str, port: int, door: str = "") -> _Listening:
        streams = _Streams(names, door)
        stream = await asyncio.start_server(streams.serve, address, port, limit=1 << 17)
        port = int(stream.sockets[0].getsockname()[1])
        try:
            datagrams, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Datagrams(names, door), local_addr=(address, port)
            )
        except OSError:
            stream.close()
            raise
        return cls(stream, datagrams)

    def close(self) -> None:
        for one in self._served:
            one.close()


class _Doors:
    """Sockets by which one machine alone comes, kept as the configuration has them."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._open: dict[tuple[str, str], _Listening] = {}
        self._lock = asyncio.Lock()

    async def settle(self) -> None:
        """Opens those that are new, closes those that are gone, and writes down where all are."""
        async with self._lock:
            wanted = self._names.doors()
            keys = {(door, address) for door, own in wanted.items() for address in own}
            for key in self._open.keys() - keys:
                self._open.pop(key).close()
            found: dict[str, list[str]] = {}
            for door, address in sorted(keys):
                one = self._open.get((door, address)) or await self._start(door, address)
                if one is not None:
                    self._open[door, address] = one
                    where = f"[{address}]" if ":" in address else address
                    found.setdefault(door, []).append(f"{where}:{one.port}")
            self._names.write_doors(found)

    async def _start(self, door: str, address: str) -> _Listening | None:
        # A port that is free for one transport may be taken for the other.
        for _ in range(16):
            with suppress(OSError):
                return await _Listening.start(self._names, address, 0, door)
        return None


async def serve(names: Names, ready: int) -> None:
    """Serves until it is ended."""
    loop = asyncio.get_running_loop()
    doors = _Doors(names)
    jobs: set[asyncio.Task[None]] = set()

    def load() -> None:
        names.load()
        job = loop.create_task(doors.settle())
        jobs.add(job)
        job.add_done_callback(jobs.discard)

    loop.add_signal_handler(signal.SIGHUP, load)
    served = [await _Listening.start(names, address, dns.PORT) for address in names.listening()]
    await doors.settle()
    os.write(ready, b"x")
    os.close(ready)
    await asyncio.Event().wait()
    del served


def main() -> None:
    """Serves the network whose directory is its first argument."""
    names = Names(sys.argv[1])
    asyncio.run(serve(names, int(sys.argv[2])))


if __name__ == "__main__":
    main()

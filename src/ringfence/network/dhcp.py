"""Addresses that a LAN's own server gives to a machine, asked for in its name by the host.

So a machine has them before it runs, whatever runs in it, and they are kept while it lives. The
host asks by a port of the bridge that is there just for this: what it sends out by the bridge
itself doesn't come to a server of its own, such as a virtual network's.

Source: RFC 2131, RFC 2132.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import select
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from ringfence.errors import HostError
from ringfence.network import links
from ringfence.network.addresses import derive_mac

__all__ = ["Lease", "Renewal", "ask"]

_ETH_IP = 0x0800
_MTU = 1500
_CLIENT, _SERVER = 68, 67
_MAGIC = b"\x63\x82\x53\x63"
_DISCOVER, _OFFER, _REQUEST, _ACK, _NAK, _RELEASE = 1, 2, 3, 5, 6, 7
_MASK, _ROUTER, _DNS, _NAME, _WANTED, _TIME, _KIND, _WHO, _ASKED = 1, 3, 6, 12, 50, 51, 53, 54, 55
_WAITS_S = (0.7, 1.5, 3.0)
_LEAST_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What a server gave.

    Args:
        address: With its prefix.
        routers: The way outside, if there is one.
        nameservers: Who tells names.
        seconds: How long it holds.
        server: Who gave it.
        by: The Ethernet address by which it is reached.
    """

    address: str
    routers: tuple[str, ...]
    nameservers: tuple[str, ...]
    seconds: int
    server: str
    by: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """From whom to whom a message goes.

    Args:
        source: The Ethernet address that it comes from.
        to: Whose it goes to; everybody's, while nobody has the address yet.
        address: The machine's, if it has one.
        server: Likewise.
    """

    source: bytes
    to: bytes = b"\xff" * 6
    address: bytes = bytes(4)
    server: bytes = b"\xff" * 4


def _checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _frame(mac: bytes, number: bytes, options: list[tuple[int, bytes]], way: _Way) -> bytes:
    # Answers are to go to everybody, but for those to who has an address.
    flags = 0 if any(way.address) else 0x8000
    head = (1, 1, 6, 0, number, 0, flags, way.address, mac.ljust(16, b"\0"))
    body = struct.pack(">BBBB4sHH4s12x16s192x", *head)
    body += _MAGIC + b"".join(bytes((kind, len(data))) + data for kind, data in options) + b"\xff"
    udp = struct.pack(">HHHH", _CLIENT, _SERVER, 8 + len(body), 0) + body
    size = 20 + len(udp)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0x10, size, 0, 0, 64, 17, 0, way.address, way.server)
    ip = ip[:10] + struct.pack(">H", _checksum(ip)) + ip[12:]
    return way.to + way.source + struct.pack(">H", _ETH_IP) + ip + udp


def _options(frame: bytes, mac: bytes, number: bytes) -> tuple[str, dict[int, bytes]] | None:
    """The address and the options of an answer to us, if the frame is one."""
    if len(frame) < 34 or frame[12:14] != b"\x08\0" or frame[23] != 17:
        return None
    udp = frame[14 + (frame[14] & 15) * 4 :]
    if len(udp) < 8 + 240 or struct.unpack_from(">HH", udp) != (_SERVER, _CLIENT):
        return None
    body = udp[8:]
    if body[0] != 2 or body[4:8] != number or body[28:34] != mac or body[236:240] != _MAGIC:
        return None
    found: dict[int, bytes] = {}
    at = 240
    while at + 1 < len(body) and body[at] != 255:
        if body[at] == 0:
            at += 1
            continue
        size = body[at + 1]
        found[body[at]] = body[at + 2 : at + 2 + size]
        at += 2 + size
    if len(found.get(_WHO, b"1234")) != 4:
        # A server that can't say who it is.
        return None
    return str(ipaddress.IPv4Address(body[16:20])), found


def _each(data: bytes) -> tuple[str, ...]:
    return tuple(
        str(ipaddress.IPv4Address(data[at : at + 4])) for at in range(0, len(data) // 4 * 4, 4)
    )


class _Client:
    def __init__(self, bridge: str, mac: str, name: str) -> None:
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._name = name.encode()[:63]
        # Not the machine's: the bridge would send there what is for a machine that runs.
        source = bytes.fromhex(derive_mac(mac, "asks").replace(":", ""))
        self._way = _Way(source=source)
        self._by = self._way.to
        link = links.link_name("rfd", bridge, mac)
        (self._tap,) = links.add_tap(link, bridge, _MTU, headers=False)

    def ask(self, kind: int, more: list[tuple[int, bytes]]) -> tuple[str, dict[int, bytes]] | None:
        number = secrets.token_bytes(4)
        options = [(_KIND, bytes((kind,))), *more, (_ASKED, bytes((_MASK, _ROUTER, _DNS, _TIME)))]
        if self._name:
            options.append((_NAME, self._name))
        expected = [bytes((one,)) for one in ((_OFFER,) if kind == _DISCOVER else (_ACK, _NAK))]
        for wait_s in _WAITS_S:
            with suppress(OSError):
                os.write(self._tap, _frame(self._mac, number, options, self._way))
            deadline = time.monotonic() + wait_s
            while (left := deadline - time.monotonic()) > 0:
                if not select.select([self._tap], [], [], left)[0]:
                    break
                frame = os.read(self._tap, 2048)
                found = _options(frame, self._mac, number)
                if found is not None and found[1].get(_KIND, b"")[:1] in expected:
                    self._by = frame[6:12]
                    return found
        return None

    def confirm(self, address: str, server: bytes) -> Lease | None:
        wanted = [(_WANTED, ipaddress.IPv4Address(address).packed), (_WHO, server)]
        found = self.ask(_REQUEST, wanted)
        if found is None or found[1][_KIND][0] != _ACK:
            return None
        own, options = found
        mask = options.get(_MASK, b"\xff\xff\xff\0")[:4]
        prefix = int.from_bytes(mask, "big").bit_count()
        return Lease(
            address=f"{own}/{prefix}",
            routers=_each(options.get(_ROUTER, b""))[:1],
            nameservers=_each(options.get(_DNS, b"")),
            seconds=int.from_bytes(options.get(_TIME, b"\0\0\x0e\x10"), "big"),
            server=str(ipaddress.IPv4Address(options.get(_WHO, server))),
            by=self._by,
        )

    def release(self, lease: Lease) -> None:
        own = ipaddress.IPv4Address(lease.address.partition("/")[0]).packed
        server = ipaddress.IPv4Address(lease.server).packed
        way = _Way(source=self._way.source, to=lease.by, address=own, server=server)
        options = [(_KIND, bytes((_RELEASE,))), (_WHO, server)]
        with suppress(OSError):
            os.write(self._tap, _frame(self._mac, secrets.token_bytes(4), options, way))

    def close(self) -> None:
        os.close(self._tap)


def ask(bridge: str, mac: str, name: str) -> Lease | None:
    """Asks a LAN's server for an address; None when nobody answers in a few seconds.

    Args:
        bridge: The host's bridge that is on the LAN.
        mac: The machine's Ethernet address.
        name: The machine's name, told to the server.

    Raises:
        HostError: The host refuses.
    """
    client = _Client(bridge, mac, name)
    try:
        offer = client.ask(_DISCOVER, [])
        if offer is None or _WHO not in offer[1]:
            return None
        return client.confirm(offer[0], offer[1][_WHO])
    finally:
        client.close()


class Renewal:
    """Keeps a lease while a machine lives."""

    def __init__(self, bridge: str, mac: str, name: str, lease: Lease) -> None:
        self._asked = (bridge, mac, name)
        self._lease = lease
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        address = self._lease.address.partition("/")[0]
        server = ipaddress.IPv4Address(self._lease.server).packed
        wait_s = max(_LEAST_S, self._lease.seconds / 2)
        while not self._ended.wait(wait_s):
            with suppress(HostError):
                client = _Client(*self._asked)
                try:
                    again = client.confirm(address, server)
                finally:
                    client.close()
                wait_s = max(_LEAST_S, (again.seconds if again else self._lease.seconds / 4) / 2)

    def close(self) -> None:
        """Gives it back: a LAN of many short machines would have no address left."""
        self._ended.set()
        with suppress(HostError):
            client = _Client(*self._asked)
            try:
                client.release(self._lease)
            finally:
                client.close()

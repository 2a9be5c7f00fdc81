"""Doors of a LAN's machines: sockets of the host by which one machine alone comes. Needs no root."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from ringfence.network import names, relay
from ringfence.network.store import Member, NetworkSpec, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OWN = ("127.0.0.1", "::1")
_SPEC = NetworkSpec(name="lan", mode="bridge", interface="x", allow=("db",))


@pytest.fixture
def folder(home: Path) -> Iterator[Path]:  # noqa: ARG001 - state goes there
    found = Store().folder("lan")
    found.mkdir(parents=True)
    yield found
    relay.stop(_SPEC)
    names.stop(found)


def _members(count: int) -> dict[str, Member]:
    return {
        f"m{number}": Member(machine_id=f"id{number}", name=f"m{number}", mac="")
        for number in range(count)
    }


def _places(doors: dict[str, list[str]]) -> list[tuple[str, int]]:
    return [
        (address.strip("[]"), int(port))
        for own in doors.values()
        for address, _, port in (text.rpartition(":") for text in own)
    ]


def _takes(place: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(place, timeout=5):
            return True
    except ConnectionRefusedError:
        return False


def test_many_machines_have_doors_at_once_and_keep_them(folder: Path) -> None:
    # More than go in one message.
    many = _members(20)
    first = relay.apply_doors(_SPEC, many, _OWN, by_lan=())
    asked = {name: (one, _OWN) for name, one in many.items()}
    told = names.apply_doors(folder, "t", _SPEC, asked, {"db": ["192.0.2.7"]})
    for doors in (first, told):
        assert doors.keys() == many.keys()
        places = _places(doors)
        assert len(set(places)) == 40
        assert all(_takes(place) for place in places)
    assert relay.apply_doors(_SPEC, many, _OWN, by_lan=()) == first
    assert names.apply_doors(folder, "t", _SPEC, asked, {}) == told
    fewer = _members(2)
    left = relay.apply_doors(_SPEC, fewer, _OWN, by_lan=())
    some = names.apply_doors(folder, "t", _SPEC, {n: asked[n] for n in fewer}, {})
    for doors, before in ((left, first), (some, told)):
        assert doors == {name: before[name] for name in fewer}
        assert not any(_takes(place) for place in set(_places(before)) - set(_places(doors)))


def test_a_host_that_moves_has_its_doors_elsewhere(folder: Path) -> None:
    one = _members(1)
    before = relay.apply_doors(_SPEC, one, ("127.0.0.1",), by_lan=())
    after = relay.apply_doors(_SPEC, one, ("127.0.0.2",), by_lan=())
    assert [address for address, _ in _places(after)] == ["127.0.0.2"]
    assert not _takes(_places(before)[0])
    asked = {name: (member, ("127.0.0.1",)) for name, member in one.items()}
    before = names.apply_doors(folder, "t", _SPEC, asked, {})
    moved = {name: (member, ("127.0.0.2",)) for name, member in one.items()}
    after = names.apply_doors(folder, "t", _SPEC, moved, {})
    assert [address for address, _ in _places(after)] == ["127.0.0.2"]
    assert not _takes(_places(before)[0])


def test_a_door_tells_its_machine_whoever_asks_by_it(folder: Path) -> None:
    two = _members(2)
    closed = Member(machine_id="id1", name="m1", mac="", deny=("evil.example",))
    asked = {"m0": (two["m0"], _OWN[:1]), "m1": (closed, _OWN[:1])}
    spec = NetworkSpec(name="lan", mode="bridge", interface="x", resolve_all=True)
    told = names.apply_doors(folder, "t", spec, asked, {"db": ["192.0.2.7"]})
    # Nobody is asked in turn: a refusal, or a failure to ask.
    assert _code(told["m1"][0], "evil.example") == 5
    assert _code(told["m1"][0], "db") == 0
    refused = names.refusals(folder)
    assert [(one["port"], one["destination"]) for one in refused] == [("m1", "evil.example")]


def _code(place: str, name: str) -> int:
    labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
    query = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"
    address, _, port = place.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(5)
        asking.sendto(query, (address, int(port)))
        return asking.recv(512)[3] & 15

"""The name server of networks with rules about names: what it reads, answers and refuses."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from typing import TYPE_CHECKING

import pytest

from ringfence.network import _names_messages as dns
from ringfence.network import _names_server as server

if TYPE_CHECKING:
    from pathlib import Path


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return (
        struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)
    )


def names(folder: Path, **changes: object) -> server.Names:
    rule = {"action": "allow", "domain": "*.good.example", "narrow": False, "pins": "pin_net_0"}
    document = {
        "family": "inet", "table": "t", "nft": "/bin/true", "listen": [], "servers": [],
        "names": {"db": ["10.0.0.2", "fd00::2"]}, "machines": {"10.0.0.3": "m1"},
        "policies": {"net": {"closed": True, "rules": [rule]}},
    }  # fmt: skip
    (folder / "names.json").write_text(json.dumps(document | changes))
    return server.Names(str(folder))


def answer(found: server.Names, message: bytes, source: str = "10.0.0.3") -> bytes | None:
    return asyncio.run(found.answer(message, source, stream=False))


def code(message: bytes | None) -> int:
    assert message is not None
    return message[3] & 15


def test_domains_are_about_names_whole_or_below() -> None:
    assert dns.has("a.example", "a.example")
    assert not dns.has("a.example", "b.a.example")
    assert dns.has("*.a.example", "c.b.a.example")
    assert not dns.has("*.a.example", "a.example")
    assert not dns.has("*.a.example", "ba.example")


def test_own_names_are_answered_by_their_kind(tmp_path: Path) -> None:
    found = names(tmp_path)
    four, six, text = (answer(found, query("DB", kind)) for kind in (1, 28, 16))
    assert four is not None
    assert six is not None
    assert dns.addresses(four) == [("10.0.0.2", 5)]
    assert dns.addresses(six) == [("fd00::2", 5)]
    assert text is not None
    assert dns.addresses(text) == []
    assert code(text) == 0


def test_what_no_rule_allows_is_refused_and_written_down(tmp_path: Path) -> None:
    found = names(tmp_path)
    for name in ("evil.example", "good.example", "x.evil.example"):
        assert code(answer(found, query(name))) == 5, name
    # It is allowed, and there is nobody to ask.
    assert code(answer(found, query("a.good.example"))) == 2
    found.write_refusals()
    written = json.loads((tmp_path / "names-refused.json").read_text())
    assert [one["destination"] for one in written] == [
        "evil.example", "good.example", "x.evil.example",
    ]  # fmt: skip
    assert {one["reason"] for one in written} == {"not-allowed"}


def test_rules_of_one_machine_hold_for_it_alone(tmp_path: Path) -> None:
    denied = {"action": "deny", "domain": "a.good.example", "narrow": False, "pins": "p"}
    rule = {"action": "allow", "domain": "*.good.example", "narrow": False, "pins": "pin_net_0"}
    policies = {
        "net": {"closed": True, "rules": [rule]},
        "m1": {"closed": False, "rules": [denied]},
    }
    found = names(tmp_path, policies=policies)
    assert code(answer(found, query("a.good.example"), "10.0.0.3")) == 5
    assert code(answer(found, query("a.good.example"), "10.0.0.4")) == 2


def test_malformed_messages_get_no_answer_and_end_nothing(tmp_path: Path) -> None:
    found = names(tmp_path)
    whole = query("a.b.example")
    chance = random.Random(1)
    for size in range(len(whole)):
        assert answer(found, whole[:size]) is None
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        answer(found, bytes(damaged))
    # A name that points at itself.
    loop = whole[:12] + b"\xc0\x0c" + whole[-4:] + b"\0" * 4
    assert answer(found, loop) is None


def test_addresses_in_answers_are_bounded_by_the_message() -> None:
    message = query("a.example")
    record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + bytes((192, 0, 2, 1))
    one = message[:6] + struct.pack(">H", 1) + message[8:] + record
    assert dns.addresses(one) == [("192.0.2.1", 60)]
    many = message[:6] + struct.pack(">H", 9) + message[8:] + record
    with pytest.raises(dns.MalformedError):
        dns.addresses(many)


def test_one_machine_leaves_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose questions aren't answered by those who are asked keeps nobody else waiting."""
    found = names(tmp_path, servers=["192.0.2.1"])

    async def silent(_server: str, _query: bytes) -> bytes:
        await asyncio.sleep(0.05)
        raise OSError

    monkeypatch.setattr(dns, "ask_datagram", silent)

    async def flood() -> list[bytes | None]:
        many = [
            found.answer(query(f"n{number}.good.example"), "10.0.0.3", stream=False)
            for number in range(500)
        ]
        other = found.answer(query("a.good.example"), "10.0.0.4", stream=False)
        return await asyncio.gather(*many, other)

    answers = asyncio.run(flood())
    assert sum(one is not None for one in answers[:-1]) == 128
    assert code(answers[-1]) == 2
    # And it has its turn again.
    assert code(answer(found, query("a.good.example"))) == 2

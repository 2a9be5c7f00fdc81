"""Interfaces as they are written, and the addresses that machines get."""

from __future__ import annotations

import random

import pytest

from ringfence.errors import ConfigError, ConflictError
from ringfence.machine.options import spec_from
from ringfence.network import AttachOptions, LinkSpec, Policy, dhcp, egress, leases
from ringfence.network.options import name_of
from ringfence.network.store import Member, NetworkSpec
from ringfence.network.tables import Table

_NET = NetworkSpec(
    name="n", mode="nat", subnets=("10.5.0.0/29", "fd00:5::/64"), leases=("db=10.5.0.3",)
)


def test_interfaces_are_parsed() -> None:
    assert LinkSpec.parse("web") == LinkSpec(network="web")
    parsed = LinkSpec.parse("routed:10.1.0.0/24,ip=10.1.0.9,ip=fd00::9,mac=02:00:00:00:00:0A")
    assert parsed.network == "routed:10.1.0.0/24"
    assert parsed.addresses == ("10.1.0.9", "fd00::9")
    assert parsed.mac == "02:00:00:00:00:0a"
    for text in ("", ",mac=02:00:00:00:00:01", "web,ip=", "web,speed=1"):
        with pytest.raises(ConfigError):
            LinkSpec.parse(text)


def test_a_network_is_named_as_it_is_joined_and_as_it_is_listed() -> None:
    for text, name in (
        ("web", "web"), ("nat", "nat"), ("bridge:br0", "bridge-br0"), ("bridge-br0", "bridge-br0"),
        ("routed:10.5.0.0/24", "routed-10.5.0.0_24"), ("routed:fd00:5::/64", "routed-fd00.5.._64"),
    ):  # fmt: skip
        assert name_of(text) == name


def test_keywords_say_all_interfaces() -> None:
    spec = spec_from({"network": ["web", "back"], "ip": "10.5.0.2", "mac": "02:00:00:00:00:01"})
    assert [link.network for link in spec.links] == ["web", "back"]
    assert spec.links[0].addresses == ("10.5.0.2",)
    assert spec_from({"network": "none"}).links == ()
    assert spec_from({"network": Policy(default="deny")}).policy.refuses_by_default
    with pytest.raises(ConfigError, match="twice"):
        spec_from({"network": Policy(allow="example.com"), "deny": ["any"]})


def test_machines_get_what_is_kept_for_them_or_what_is_free() -> None:
    def choose(name: str, *others: Member, wanted: tuple[str, ...] = ()) -> tuple[str, ...]:
        return leases.choose(_NET, others, AttachOptions(name=name, addresses=wanted))

    assert choose("db") == ("10.5.0.3", "fd00:5::2")
    assert choose("web") == ("10.5.0.2", "fd00:5::2")
    first = Member(machine_id="1", name="web", mac="", addresses=("10.5.0.2", "fd00:5::2"))
    # The third is kept for another.
    assert choose("app", first) == ("10.5.0.4", "fd00:5::3")
    assert choose("app", wanted=("fd00:5::77",)) == ("10.5.0.2", "fd00:5::77")
    with pytest.raises(ConflictError, match="taken"):
        choose("app", wanted=("10.5.0.3",))
    for wrong in ("10.5.0.1", "10.5.0.0", "10.5.0.7", "10.6.0.2", "fd00:5::1"):
        with pytest.raises(ConfigError):
            choose("app", wanted=(wrong,))
    with pytest.raises(ConfigError, match="at most one"):
        choose("app", wanted=("10.5.0.4", "10.5.0.5"))


def test_rules_about_names_have_sets_and_others_have_none() -> None:
    table = Table(family="inet", name="t")
    member = Member(
        machine_id="1", name="m", mac="", addresses=("10.5.0.2",), deny=("*.evil.example:443",)
    )
    spec = NetworkSpec(name="n", mode="nat", allow=("10.0.0.0/8:80", "good.example"))
    egress.add_chains(table, egress.owners(spec, [member]))
    own = egress.owners(spec, [member])[1].key
    # Deny rules come first.
    network, machine = (
        [egress.pin_set(owner, rule, version) for version in (4, 6)]
        for owner, rule in zip(
            egress.owners(spec, [member]),
            (spec.policy.rules[1], member.policy.rules[0]),
            strict=True,
        )
    )
    assert set(table.sets) == {*network, *machine}
    assert table.chains["egress"][0] == "jump closed_addresses"
    assert table.chains["egress"][-1] == "jump refuse_not_allowed"
    assert f"ip saddr 10.5.0.2 jump own_{own}" in table.chains["egress"]
    assert (
        f"ip daddr @{machine[0]} tcp dport {{ 443-443 }} jump refuse_denied"
        in (table.chains[f"own_{own}"])
    )


def test_a_text_is_one_rule_and_not_its_letters() -> None:
    assert Policy(allow="10.0.0.0/8").written()["allow"] == ("10.0.0.0/8",)


def test_damaged_answers_of_a_lan_are_nobodys() -> None:
    mac, number = bytes.fromhex("020000000001"), b"\1\2\3\4"
    frame = bytearray(
        dhcp._frame(mac, number, [(53, b"\2"), (54, bytes(4))], dhcp._Way(source=mac))
    )
    frame[34:38] = b"\0\x43\0\x44"
    frame[42] = 2
    found = dhcp._options(bytes(frame), mac, number)
    assert found is not None
    assert found[1][53] == b"\2"
    chance = random.Random(2)
    for _ in range(3000):
        damaged = bytearray(frame[: chance.randint(0, len(frame))])
        for _ in range(min(len(damaged), 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        dhcp._options(bytes(damaged), mac, number)
    assert dhcp._options(bytes(frame), mac, b"\0\0\0\0") is None
    # A server that says who it is in three bytes.
    short = dhcp._frame(mac, number, [(53, b"\2"), (54, bytes(3))], dhcp._Way(source=mac))
    short = short[:34] + frame[34:38] + short[38:42] + b"\2" + short[43:]
    assert dhcp._options(short, mac, number) is None

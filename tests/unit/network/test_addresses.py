"""Addresses that are made, chosen and given."""

from __future__ import annotations

import ipaddress

import pytest

from ringfence.errors import ConfigError, ConflictError
from ringfence.network import addresses


@pytest.fixture(autouse=True)
def _no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = [ipaddress.IPv4Network("10.9.0.0/16")]
    monkeypatch.setattr(addresses, "host_networks", lambda: routes)


def test_macs_are_the_same_for_the_same_words_and_ones_own() -> None:
    one = addresses.derive_mac("a", "b")
    assert one == addresses.derive_mac("a", "b") != addresses.derive_mac("ab", "")
    assert int(one[:2], 16) & 3 == 2


def test_chosen_subnets_overlap_nothing() -> None:
    first = addresses.choose_v4("x", [])
    second = addresses.choose_v4("x", [first])
    assert not first.overlaps(second)
    assert addresses.choose_v6("x") == addresses.choose_v6("x")
    assert addresses.choose_v6("x").subnet_of(ipaddress.IPv6Network("fd00::/8"))


@pytest.mark.parametrize(
    "text",
    ["10.5.0.1/24", "10.5.0.0/30", "10.0.0.0/7", "fd00::/16", "x", "127.1.0.0/16", "fe80::/64"],
)
def test_what_is_no_subnet_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        addresses.parse_subnet(text)


def test_overlaps_are_named() -> None:
    other = ipaddress.IPv4Network("10.5.0.0/16")
    with pytest.raises(ConflictError, match="network web"):
        addresses.parse_subnet("10.5.1.0/24", [("web", other)])
    with pytest.raises(ConflictError, match="route"):
        addresses.parse_subnet("10.9.1.0/24")


def test_addresses_run_out() -> None:
    net = ipaddress.IPv4Network("10.5.0.0/29")
    used: list[str] = []
    for _ in range(5):
        used.append(addresses.free_address(net, used))
    assert used == [f"10.5.0.{n}" for n in range(2, 7)]
    with pytest.raises(ConflictError, match="no free address"):
        addresses.free_address(net, used)
    with pytest.raises(ConflictError, match="taken"):
        addresses.free_address(net, used, ["10.5.0.3"])
    with pytest.raises(ConfigError, match="not an address"):
        addresses.free_address(net, [], ["10.6.0.3"])

"""Addresses: made from names so that they stay the same, and kept apart from the host's own."""

from __future__ import annotations

import hashlib
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "check_all_wanted",
    "check_free",
    "check_wanted",
    "choose_v4",
    "choose_v6",
    "derive_mac",
    "free_address",
    "host_nameservers",
    "host_networks",
    "host_networks_v6",
    "parse_subnet",
]

V4 = ipaddress.IPv4Network
V6 = ipaddress.IPv6Network
Network = V4 | V6

_ROUTES = Path("/proc/net/route")
_ROUTES6 = Path("/proc/net/ipv6_route")
_RESOLV = Path("/etc/resolv.conf")
# What no network of machines can have (RFC 6890).
_SPECIAL = {
    ipaddress.ip_network(text): what
    for text, what in (
        ("0.0.0.0/8", "this host"),
        ("127.0.0.0/8", "a host's loopback"),
        ("169.254.0.0/16", "a link's own addresses"),
        ("224.0.0.0/3", "groups and reserved addresses"),
        ("::/8", "a host's loopback and translated addresses"),
        ("fe80::/10", "a link's own addresses"),
        ("ff00::/8", "groups"),
    )
}
_POOL = ipaddress.IPv4Network("10.128.0.0/9")


def derive_mac(*parts: str) -> str:
    """An Ethernet address of one's own making (IEEE 802c: locally administered), from words."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x52, *digest[:5]))


def host_networks() -> list[V4]:
    """The IPv4 networks that the host has routes to, but for the default."""
    found = []
    try:
        lines = _ROUTES.read_text().splitlines()[1:]
    except OSError:
        return []
    for line in lines:
        fields = line.split()
        base, mask = (int.from_bytes(bytes.fromhex(fields[i]), "little") for i in (1, 7))
        if mask:
            bits = mask.bit_count()
            found.append(ipaddress.IPv4Network((base, bits), strict=False))
    return found


def host_networks_v6() -> list[V6]:
    """The IPv6 networks that the host has routes to, but for the default, link-local and groups."""
    found = []
    try:
        lines = _ROUTES6.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split()
        net = V6((int(fields[0], 16), int(fields[1], 16)), strict=False)
        if net.prefixlen and not (net.is_link_local or net.is_multicast or net.is_loopback):
            found.append(net)
    return found


def choose_v4(name: str, taken: Iterable[Network]) -> V4:
    """A /24 that overlaps neither ``taken`` nor the host's routes, the same for a name if it can.

    Raises:
        ConflictError: There is none left.
    """
    used = [*host_networks(), *(net for net in taken if isinstance(net, V4))]
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    count = 1 << (24 - _POOL.prefixlen)
    base = int(_POOL.network_address)
    for step in range(count):
        candidate = V4((base + ((start + step) % count << 8), 24))
        if not any(candidate.overlaps(other) for other in used):
            return candidate
    message = f"no free IPv4 subnet is left in {_POOL}"
    raise ConflictError(message, hint="say one: --subnet CIDR")


def choose_v6(name: str) -> V6:
    """A unique local /64 (RFC 4193 §3.2), the same for a name."""
    digest = hashlib.sha256(b"v6\0" + name.encode()).digest()
    return V6((int.from_bytes(b"\xfd" + digest[:7], "big") << 64, 64))


def parse_subnet(text: str, taken: Iterable[tuple[str, Network]] = ()) -> Network:
    """A subnet as it is written, checked against the host's routes and other networks.

    Args:
        text: ``10.5.0.0/24`` or ``fd00:1::/64``.
        taken: Other networks with their names.

    Raises:
        ConfigError: It isn't one, or too small or large.
        ConflictError: It overlaps another.
    """
    try:
        found = ipaddress.ip_network(text)
    except ValueError as error:
        message = f"{text!r} is not a subnet: {error}"
        raise ConfigError(message, hint="such as 10.5.0.0/24 or fd00:5::/64") from error
    low, high = (8, 29) if found.version == 4 else (32, 120)
    if not low <= found.prefixlen <= high:
        message = f"a network's prefix has {low} to {high} bits, not {found.prefixlen}"
        raise ConfigError(message)
    for special, what in _SPECIAL.items():
        if found.version == special.version and found.overlaps(special):
            message = f"the subnet {found} overlaps {special}: {what}, not for a network"
            raise ConfigError(message, hint="such as 10.5.0.0/24 or fd00:5::/64")
    for name, other in taken:
        if found.version == other.version and found.overlaps(other):
            message = f"the subnet {found} overlaps {other} of the network {name}"
            raise ConflictError(message, hint="choose another, or leave it out to have one chosen")
    check_free(found)
    return found


def check_free(net: Network) -> None:
    """Checks that the host has no route to a part of a network.

    Raises:
        ConflictError: It has.
    """
    routes: Sequence[Network] = host_networks() if net.version == 4 else host_networks_v6()
    for route in routes:
        if net.overlaps(route):
            message = f"the subnet {net} overlaps {route}, which this host has a route to"
            raise ConflictError(message, hint="choose another, or leave it out to have one chosen")


def check_wanted(text: str, nets: Iterable[Network]) -> None:
    """Checks that an address is one that a machine on these networks can have.

    Raises:
        ConfigError: It isn't.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        message = f"{text!r} is not an IP address"
        raise ConfigError(message) from error
    for net in nets:
        if address in net:
            ends = {net.network_address, net[1], *([net[-1]] if net.version == 4 else [])}
            if address in ends:
                message = f"{text} is the network's own, the host's or the broadcast address"
                raise ConfigError(message)
            return
    of = " or ".join(str(net) for net in nets)
    message = f"{text} is not an address of the network {of}"
    raise ConfigError(message)


def check_all_wanted(wanted: Sequence[str], nets: Sequence[Network]) -> None:
    """Checks what a machine wants: at most one address of each family.

    Raises:
        ConfigError: It can't have them.
    """
    for text in wanted:
        check_wanted(text, nets)
    versions = [":" in text for text in wanted]
    if len(set(versions)) != len(versions):
        message = "a machine has at most one IPv4 and one IPv6 address on a network"
        raise ConfigError(message)


def free_address(net: Network, used: Iterable[str], wanted: Iterable[str] = ()) -> str:
    """An address of ``net`` that nobody has: one that is wanted, else the first free.

    Raises:
        ConfigError: A wanted one isn't of the network, or is its own.
        ConflictError: It is taken, or none is free.
    """
    taken = set(used)
    for text in wanted:
        address = ipaddress.ip_address(text)
        if address.version != net.version:
            continue
        check_wanted(text, [net])
        if str(address) in taken:
            message = f"the address {text} is taken"
            raise ConflictError(message, hint="choose another, or leave it out to have one chosen")
        return str(address)
    for address in _hosts(net):
        if str(address) not in taken:
            return str(address)
    message = f"the network {net} has no free address left"
    raise ConflictError(message, hint="make a larger network: --subnet CIDR")


def _hosts(net: Network) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    # The first is the gateway's.
    last = min(net.num_addresses - 1, 1 << 16)
    for offset in range(2, last):
        yield net[offset]


def host_nameservers() -> list[str]:
    """The host's name servers (``resolv.conf(5)``)."""
    found = []
    try:
        lines = _RESOLV.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            # A link-local server with its interface is of no use to others.
            address, _, zone = words[1].partition("%")
            if not zone:
                found.append(address)
    return found

"""Egress rules of machines on a LAN, whose frames the host passes on but doesn't route.

Frames are looked at where they come in from a machine's link, so a machine is told by its link and
not by an address that it says. What it begins is held to the rules; what it answers, to those it
heard from: sets remember these, as they do in place of tracked connections, which not every kernel
has for bridges.

Where rules are about names, two things are led up to the host instead of on to the LAN: whatever
the machine asks name servers, and connections that have to show their names. Such frames get the
Ethernet address of the host's end of the link and a mark that says whose they are, by which a table ``inet``
translates their destination to a door of the machine's: of the name server
(:mod:`ringfence.network.names`) or of the relay (:mod:`ringfence.network.relay`).

Source: ``nft(8)``, ``ebtables(8)`` (``redirect``), RFC 4861 (neighbours), RFC 4890 §4.4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ringfence.network import egress, firewall, links, relay, tables
from ringfence.network.tables import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ringfence.network.egress import Owner
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["Lan", "about_names", "hold"]

# By address version: the family's name, the type of its addresses.
_FAMILIES = {4: ("ip", "ipv4_addr"), 6: ("ip6", "ipv6_addr")}
# For as long as a silent TCP connection is thought to live: programs that keep one up ask after
# two hours (tcp(7)). One that only began, or ended, is forgotten soon.
_LONG, _SHORT, _TALK = "3h", "2m", "3m"
_SET = "flags dynamic,timeout; timeout {}; size 65536"
_ASKING = "meta l4proto { tcp, udp } th dport 53"
# DNS over TLS and QUIC, and what machines ask one another for names: LLMNR, mDNS, NetBIOS.
_ASKING_OTHERS = (
    "meta l4proto { tcp, udp } th dport 853 jump refuse_no_name",
    "udp dport { 137, 5353, 5355 } jump refuse_no_name",
)
_BEGINS_TCP = "tcp flags & (syn | ack) == syn"
_ENDS_TCP = "tcp flags & (fin | syn | rst) != 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lan:
    """What the rules have to know of the host's place on a LAN.

    Args:
        table: The name of the tables.
        bridge: The host's bridge.
        own: The host's addresses there.
        servers: By their addresses the Ethernet addresses of its routers and name servers.
        names: By machines' names where what they ask for names goes.
        relay: By machines' names where connections go that have to show theirs.
    """

    table: str
    bridge: str
    own: Sequence[str] = ()
    servers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    names: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))
    relay: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))


class _Machine:
    """A machine with what is known of it under the names that chains and sets have."""

    def __init__(self, lan: Lan, number: int, member: Member, owner: Owner, *, named: bool) -> None:
        name = member.name or member.machine_id
        self.number = number
        self.link = member.link
        self.mac = member.mac
        self.owner = owner
        self.key = owner.key
        self.named = named
        self.names = list(lan.names.get(name, ()))
        self.relay = list(lan.relay.get(name, ()))
        # Others on the bridge have rules of their own, which must not take these for theirs.
        digest = hashlib.sha256(lan.table.encode()).digest()
        # A bridge has at most 1024 ports.
        self.mark = (int.from_bytes(digest[:2], "big") << 16) + number + 1


def hold(lan: Lan, spec: NetworkSpec, members: Sequence[Member]) -> None:
    """Writes the tables of a LAN's machines: their own addresses, their bandwidth, their rules.

    Raises:
        HostError: The kernel refuses.
        UnsupportedError: There is no nft.
    """
    # By its link: a LAN's machine may have addresses that we don't know, IPv6 ones above all, which
    # routers have it make.
    members = [dataclasses.replace(one, addresses=_held(one)) for one in members]
    held = firewall.own_addresses(lan.table, members)
    egress.add_refusals(held, spec.name, rejects=False)
    held.counters = (*held.counters, "spoofed")
    network, *owners = [egress.Owner(one.key, one.policy) for one in egress.owners(spec, members)]
    egress.add_pins(held, [network, *owners])
    held.chain("net", egress.chain(network, "return"))
    machines = [
        _Machine(lan, number, member, owner, named=about_names(spec, member))
        for number, (member, owner) in enumerate(zip(members, owners, strict=True))
        if member.link
    ]
    for one in machines:
        _add_sets(held, one)
        chain = held.chains[f"machine_{one.number}"]
        # It may be whom it likes there, but not this host, nor those that others rely on.
        others = [ip for ip, mac in lan.servers.items() if mac != one.mac]
        chain[:0] = _is_not({*lan.own, *others})
        chain.append(f"jump begins_{one.number}")
        _add_relay(held, one)
        held.chain(f"egress_{one.number}", _egress(held, network, one))
        held.chain(f"answers_{one.number}", _answers(one))
        held.chain(f"begins_{one.number}", _begins(one, ruled=_ruled(network, one)))
        held.chain(f"hears_{one.number}", _hears(one))
    heard = [f'oifname "{one.link}" jump hears_{one.number}' for one in machines]
    held.chain("heard", heard, "type filter hook postrouting priority -10; policy accept;")
    _lead_up(held, machines)
    tables.write(held, _translate(lan, machines))


def _held(member: Member) -> tuple[str, ...]:
    return tuple(ip for ip in member.addresses if ":" not in ip) if member.held else ()


def about_names(spec: NetworkSpec, member: Member) -> bool:
    """Whether rules that hold for a machine are about names."""
    return spec.policy.about_names or member.policy.about_names


def _ruled(network: Owner, one: _Machine) -> bool:
    return network.policy.says_something or one.owner.policy.says_something


def _add_sets(held: Table, one: _Machine) -> None:
    for version, (_, address) in _FAMILIES.items():
        three = f"{address} . inet_service . inet_service"
        held.sets[f"heard_{one.key}_{version}"] = f"type {address}; {_SET.format(_LONG)}"
        held.sets[f"lately_{one.key}_{version}"] = f"type {address}; {_SET.format(_SHORT)}"
        held.sets[f"talks_{one.key}_{version}"] = f"type {three}; {_SET.format(_TALK)}"
        held.sets[f"relayed_{one.key}_{version}"] = f"type {three}; {_SET.format(_LONG)}"


def _is_not(addresses: Iterable[str]) -> Iterator[str]:
    refuse = "jump refuse_spoofed"
    for address in sorted(addresses):
        family = "ip6" if ":" in address else "ip"
        yield f"{family} saddr {address} {refuse}"
        if family == "ip":
            yield f"arp saddr ip {address} {refuse}"
        else:
            # The target's address, by its place: older versions of nft have no name for it.
            target = int(ipaddress.IPv6Address(address))
            yield f"icmpv6 type nd-neighbor-advert @th,64,128 {target:#x} {refuse}"


def _rows(doors: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Version and family of doors, and where they are."""
    for text in doors:
        version = 6 if text.startswith("[") else 4
        yield version, _FAMILIES[version][0], text


def _flow(one: _Machine, family: str, version: int) -> tuple[str, str]:
    """A TCP connection's key, and the set of those that go to the relay."""
    return f"{family} daddr . tcp dport . tcp sport", f"@relayed_{one.key}_{version}"


def _add_relay(held: Table, one: _Machine) -> None:
    """Adds a chain ``relay_NUMBER`` that leads a connection up for all its time."""
    rules = []
    for version, family, _ in _rows(one.relay):
        key, known = _flow(one, family, version)
        for when, stays in ((f"{_ENDS_TCP}", _SHORT), (f"{_ENDS_TCP.replace('!=', '==')}", _LONG)):
            remember = f"update {known} {{ {key} timeout {stays} }}"
            rules.append(f"meta protocol {family} {when} {remember} goto lead_up_{one.number}")
    held.chain(f"relay_{one.number}", [*rules, "jump refuse_no_name"])


def _egress(held: Table, network: Owner, one: _Machine) -> Iterator[str]:
    """What a machine may begin: returns, or refuses."""
    both = (network, one.owner)
    held.chain(f"closed_{one.number}", egress.closed(both, egress.METADATA))
    held.chain(f"own_{one.number}", egress.chain(one.owner, "return"))
    yield f"jump closed_{one.number}"
    yield "jump net"
    yield f"jump own_{one.number}"
    for step, owner in zip(("net", "own"), both, strict=True):
        if one.relay and owner.policy.about_names:
            held.chain(f"looks_{step}_{one.number}", egress.looks(owner, f"relay_{one.number}"))
            yield f"meta l4proto tcp jump looks_{step}_{one.number}"


def _answers(one: _Machine) -> Iterator[str]:
    for version, (family, _) in _FAMILIES.items():
        for known in ("heard", "lately"):
            yield f"{family} daddr @{known}_{one.key}_{version} return"
    # What may be begun may be answered.
    yield f"goto egress_{one.number}"


def _begins(one: _Machine, *, ruled: bool) -> Iterator[str]:
    yield "ether type != { ip, ip6 } return"
    if one.names:
        for _, family, _ in _rows(one.names):
            yield f"meta protocol {family} {_ASKING} goto lead_up_{one.number}"
    if one.named:
        yield f"{_ASKING} jump refuse_no_name"
        yield from _ASKING_OTHERS
    for version, family, _ in _rows(one.relay):
        key, known = _flow(one, family, version)
        going_on = _BEGINS_TCP.replace("==", "!=")
        yield f"meta protocol {family} {going_on} {key} {known} goto relay_{one.number}"
    if ruled:
        yield from _answering(one)
    yield f"jump egress_{one.number}"


def _answering(one: _Machine) -> Iterator[str]:
    """What isn't the beginning of anything: it answers others, or keeps the link going."""
    answers = f"goto answers_{one.number}"
    # A piece may be a beginning in disguise.
    yield "ip frag-off & 0x3fff != 0 meta l4proto tcp jump refuse_not_allowed"
    yield "exthdr frag exists meta l4proto tcp jump refuse_not_allowed"
    yield f"{_BEGINS_TCP.replace('==', '!=')} {answers}"
    yield f"icmp type != echo-request {answers}"
    # Neighbours and groups: RFC 4861, RFC 3810.
    yield "icmpv6 type { 130-133, 135, 136, 143 } ip6 daddr { fe80::/10, ff02::/16 } return"
    yield f"icmpv6 type != echo-request {answers}"
    for asks, everyone in (
        ("udp sport 68 udp dport 67", "ip daddr 255.255.255.255"),
        ("udp sport 546 udp dport 547", "ip6 daddr ff02::1:2"),
    ):
        yield f"{asks} {everyone} return"
        yield f"{asks} {answers}"
    for version, (family, _) in _FAMILIES.items():
        talk = f"{family} daddr . udp dport . udp sport @talks_{one.key}_{version}"
        yield f"meta protocol {family} {talk} return"


def _hears(one: _Machine) -> Iterator[str]:
    # What is for it or for a group, and not what a bridge sends everywhere, not knowing better.
    group = "01:00:00:00:00:00"
    yield f"ether daddr & {group} != {group} ether daddr != {one.mac} return"
    for version, (family, _) in _FAMILIES.items():
        which = f"meta protocol {family}"
        # Only connections that go on are silent for long: a flood of others is forgotten.
        going_on = _ENDS_TCP.replace("!=", "==")
        yield f"{which} {going_on} update @heard_{one.key}_{version} {{ {family} saddr }} return"
        yield f"{which} update @lately_{one.key}_{version} {{ {family} saddr }}"
        talk = f"{family} saddr . udp sport . udp dport"
        yield f"{which} meta l4proto udp update @talks_{one.key}_{version} {{ {talk} }}"


def _lead_up(held: Table, machines: Sequence[_Machine]) -> None:
    """Adds what leads frames up to the host."""
    passing = []
    for one in machines:
        # Whatever the bridge's own address is, those of its ports are the host's as well.
        mac = links.port_mac(one.link)
        up = f"meta mark set {one.mark:#x} ether daddr set {mac} meta pkttype set host accept"
        held.chain(f"lead_up_{one.number}", [up])
        if one.names or one.relay:
            # A bridge that doesn't know the address sends a frame everywhere.
            passing.append(f'iifname "{one.link}" ether daddr {mac} drop')
        if one.names:
            # No other host answers what it asks.
            forged = f"{_ASKING.replace('dport', 'sport')} jump refuse_spoofed"
            passing.append(f'oifname "{one.link}" {forged}')
    held.chain("passing", passing, "type filter hook forward priority -10; policy accept;")


def _translate(lan: Lan, machines: Sequence[_Machine]) -> Table:
    """The way from the host's stack to a machine's doors, and no other way there."""
    inet = Table(family="inet", name=lan.table)
    led = [one for one in machines if one.names or one.relay]
    if not led:
        return inet
    rules, guard = [], ["ct status dnat accept"]
    for one in led:
        here = f'iifname "{lan.bridge}" meta mark {one.mark:#x}'
        for doors, what in (
            (one.names, _ASKING),
            # The host itself is reached by its own address.
            (one.relay, "meta l4proto tcp fib daddr type != local"),
        ):
            for version, family, at in _rows(doors):
                rules.append(f"{here} meta nfproto ipv{version} {what} dnat {family} to {at}")
                address, _, port = at.rpartition(":")
                where = f"{family} daddr {address.strip('[]')}"
                guard.append(f"{where} meta l4proto {{ tcp, udp }} th dport {port} drop")
    inet.chain("prerouting", rules, "type nat hook prerouting priority dstnat; policy accept;")
    marks = ", ".join(f"{one.mark:#x}" for one in led)
    after = [
        f'iifname != "{lan.bridge}" accept',
        f"meta mark != {{ {marks} }} accept",
        # The host's own rules about marks mean others.
        "meta mark set 0",
        "ct status dnat accept",
        "fib daddr type local accept",
        # It belongs to no connection that the host knows: it must not go on as it is.
        "drop",
    ]
    inet.chain("translated", after, "type filter hook prerouting priority 0; policy accept;")
    inet.chain("doors", guard, "type filter hook input priority filter; policy accept;")
    _leave_by_lan(inet, lan)
    return inet


def _leave_by_lan(inet: Table, lan: Lan) -> None:
    """What the relay passes on goes by the LAN: not wherever else this host has ways to."""
    away, untag = [], []
    for address in lan.own:
        family = "ip6" if ":" in address else "ip"
        tagged = f"{family} saddr {address} {family} dscp {relay.BY_LAN}"
        away.append(f'{tagged} oifname != "{lan.bridge}" meta l4proto tcp reject with tcp reset')
        untag.append(f"{tagged} {family} dscp set 0")
    inet.chain("by_lan", away, "type filter hook output priority filter; policy accept;")
    inet.chain("untag", untag, "type filter hook postrouting priority 300; policy accept;")

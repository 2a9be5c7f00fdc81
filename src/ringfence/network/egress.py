"""Egress rules as the host's packet filter has them.

A rule about a name holds for the addresses in a set that the network's name server fills
(:mod:`ringfence.network.names`), and a connection that is open by it has to show such a name
(:mod:`ringfence.network.relay`). Each refusal is counted by its reason, noted in a set with who
asked for what, and written to the kernel's log, at most five a second.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from ringfence.network.links import link_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ringfence.network.policy import Policy, Rule
    from ringfence.network.store import Member, NetworkSpec
    from ringfence.network.tables import Table

__all__ = [
    "METADATA",
    "REASONS",
    "Owner",
    "add_chains",
    "add_inspection",
    "add_pins",
    "add_refusals",
    "chain",
    "closed",
    "looks",
    "opened_host_ports",
    "owners",
    "pin_set",
    "refusal_sets",
]

REASONS = ("closed", "denied", "not_allowed", "no_name", "host", "inbound", "loopback")
# Providers' metadata and agent addresses.
METADATA = {
    4: "169.254.169.254, 100.100.100.200, 168.63.129.16, 192.0.0.192",
    6: "fd00:ec2::254, fd20:ce::254",
}
# Link-local is never forwarded; saying so counts it.
_CLOSED = {
    4: f"169.254.0.0/16, {METADATA[4].partition(', ')[2]}",
    6: f"fe80::/10, {METADATA[6]}",
}
# It hides the name that it is for.
_QUIC = "udp dport 443"
_NOTES = "flags dynamic,timeout; timeout 1h; size 512"
_PINS = "flags timeout; timeout 5m; size 16384"
_ADDRESS = {4: "ipv4_addr", 6: "ipv6_addr"}
_FAMILY = {4: "ip", 6: "ip6"}


class Owner:
    """Whose rules: the network's, or a machine's.

    Args:
        key: As chains and sets are named.
        policy: The rules.
        addresses: The machine's; none for the network.
    """

    def __init__(self, key: str, policy: Policy, addresses: tuple[str, ...] = ()) -> None:
        self.key = key
        self.policy = policy
        self.addresses = addresses


def owners(spec: NetworkSpec, members: Sequence[Member]) -> list[Owner]:
    """The network, and all machines."""
    return [
        Owner("net", spec.policy),
        *(Owner(link_name("m", one.machine_id), one.policy, one.addresses) for one in members),
    ]


def pin_set(owner: Owner, rule: Rule, version: int) -> str:
    """The set of addresses that a rule about a name holds for.

    It is the name's and not the rule's place: what was answered for one name must not be open for
    the next rule that comes to stand there.
    """
    return f"{link_name('pin_', owner.key, rule.domain)}_{version}"


def refusal_sets(reason: str) -> dict[str, str]:
    """Sets that note refusals: who, whom, transport, port."""
    found = {}
    for version, address in _ADDRESS.items():
        pair = f"{address} . {address}"
        found[f"refused_{reason}_{version}"] = f"type {pair} . inet_proto . inet_service; {_NOTES}"
        found[f"refused_{reason}_{version}_other"] = f"type {pair} . inet_proto; {_NOTES}"
    return found


def _note(reason: str) -> Iterator[str]:
    for version, family in _FAMILY.items():
        key = f"{family} saddr . {family} daddr . meta l4proto"
        name = f"refused_{reason}_{version}"
        protocol = f"meta protocol {family} meta l4proto"
        yield f"{protocol} {{ tcp, udp }} update @{name} {{ {key} . th dport counter }}"
        yield f"{protocol} != {{ tcp, udp }} update @{name}_other {{ {key} counter }}"


def add_refusals(table: Table, network: str, *, rejects: bool) -> None:
    """Adds a chain ``refuse_REASON`` for each reason.

    Args:
        table: Gets them.
        network: Its name, for the log.
        rejects: The machine is told; else its packets are dropped.
    """
    table.counters = REASONS
    for reason in REASONS:
        table.sets |= refusal_sets(reason)
        rules = [f'limit rate 5/second log prefix "ringfence {network} {reason}: "']
        rules += [*_note(reason), f"counter name {reason}"]
        if rejects:
            rules += [
                "meta l4proto tcp reject with tcp reset",
                "reject with icmpx admin-prohibited",
            ]
        else:
            rules.append("drop")
        table.chain(f"refuse_{reason}", rules)


def add_pins(table: Table, everyone: Sequence[Owner]) -> None:
    """Adds the sets of addresses that were answered for the names that rules are about."""
    for owner in everyone:
        for rule in owner.policy.rules:
            if rule.domain:
                for version, address in _ADDRESS.items():
                    table.sets[pin_set(owner, rule, version)] = f"type {address}; {_PINS}"


def add_chains(table: Table, everyone: Sequence[Owner]) -> None:
    """Adds a chain ``egress`` that admits by accepting, and what it calls.

    Args:
        table: Gets them.
        everyone: The network first.
    """
    add_pins(table, everyone)
    table.chain("closed_addresses", closed(everyone, _CLOSED))
    network, *machines = everyone
    egress = ["jump closed_addresses"]
    for owner in machines:
        if owner.policy.says_something:
            table.chain(f"own_{owner.key}", chain(owner, "return"))
            egress += [
                f"{_family(address)} saddr {address} jump own_{owner.key}"
                for address in owner.addresses
            ]
    table.chain("egress", [*egress, *chain(network, "accept")])


def _family(address: str) -> str:
    return "ip6" if ":" in address else "ip"


def closed(everyone: Sequence[Owner], addresses: Mapping[int, str]) -> Iterator[str]:
    """Rules that keep from addresses, but for what somebody's rules open."""
    for owner in everyone:
        for rule in owner.policy.rules:
            if rule.action == "allow" and _is_closed(rule.cidr):
                for where in _sources(owner, rule.cidr):
                    yield from (f"{where}{line}" for line in _about(rule, (rule.cidr,), "return"))
    for version, family in _FAMILY.items():
        yield f"{family} daddr {{ {addresses[version]} }} jump refuse_closed"


def _sources(owner: Owner, cidr: str) -> list[str]:
    own = [one for one in owner.addresses if (":" in one) == (":" in cidr)]
    return [f"{_family(one)} saddr {one} " for one in own] if owner.addresses else [""]


def _is_closed(cidr: str) -> bool:
    closed = (
        "169.254.",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2:",
        "fd20:ce:",
    )
    return cidr.startswith(closed)


def _ordered(owner: Owner, action: str) -> Iterator[tuple[Rule, list[str]]]:
    """An owner's rules, those about addresses first, with what each is about."""
    named = []
    for rule in owner.policy.rules:
        if rule.action == action and rule.domain:
            named.append((rule, [f"@{pin_set(owner, rule, version)}" for version in _FAMILY]))
        elif rule.action == action:
            yield rule, [rule.cidr]
    yield from named


def _denies_names(owner: Owner) -> bool:
    return any(rule.action == "deny" and rule.domain for rule in owner.policy.rules)


def chain(owner: Owner, admit: str, refuse: str = "") -> Iterator[str]:
    """Rules as a chain that ends in ``admit``, or in ``refuse`` (the reason's chain when empty)."""
    for rule, subjects in _ordered(owner, "deny"):
        yield from _about(rule, subjects, refuse or "jump refuse_denied")
    if _denies_names(owner):
        yield f"{_QUIC} {refuse or 'jump refuse_no_name'}"
    for rule, subjects in _ordered(owner, "allow"):
        if rule.domain and owner.policy.refuses_by_default:
            hidden = f"{_QUIC} {{}} daddr {{}} {refuse or 'jump refuse_no_name'}"
            yield from (hidden.format(_family_of(one), one) for one in subjects)
        yield from _about(rule, subjects, admit)
    if owner.policy.refuses_by_default:
        yield refuse or "jump refuse_not_allowed"


def add_inspection(table: Table, everyone: Sequence[Owner], relayed_by: Sequence[str]) -> None:
    """Adds a chain ``inspect`` that leads connections elsewhere which have to show their names.

    Those that are refused are left to the chains that refuse them.

    Args:
        table: Gets it.
        everyone: The network first.
        relayed_by: Where to, at most one address of each version.
    """
    inspect = [f"{_FAMILY[n]} daddr {{ {_CLOSED[n]} }} accept" for n in _FAMILY]
    for step, rules_of in (("admits", _admits), ("looks", looks)):
        for owner in everyone:
            if owner.policy.says_something:
                name = f"{step}_{owner.key}"
                table.chain(name, rules_of(owner))
                sources = [f"{_family(one)} saddr {one} " for one in owner.addresses] or [""]
                inspect += [f"{source}jump {name}" for source in sources]
    table.chain("inspect", inspect)
    lines = []
    for text in relayed_by:
        version, family = ("6", "ip6") if text.startswith("[") else ("4", "ip")
        lines.append(f"meta nfproto ipv{version} meta l4proto tcp dnat {family} to {text}")
    table.chain("relay", lines)


def _admits(owner: Owner) -> Iterator[str]:
    return chain(owner, "return", "accept")


def looks(owner: Owner, relay: str = "relay") -> Iterator[str]:
    """Rules that jump to ``relay`` for what has to show its name, of what is admitted."""
    if _denies_names(owner):
        yield f"jump {relay}"
    elif owner.policy.refuses_by_default:
        for rule, subjects in _ordered(owner, "allow"):
            yield from _about(rule, subjects, f"jump {relay}" if rule.domain else "return")


def _family_of(subject: str) -> str:
    return "ip6" if ":" in subject or subject.endswith("_6") else "ip"


def _about(rule: Rule, subjects: Sequence[str], verdict: str) -> Iterator[str]:
    for subject in subjects:
        where = f"{_family_of(subject)} daddr {subject}"
        if not rule.ports and rule.transport is None:
            yield f"{where} {verdict}"
            continue
        if rule.transport == "icmp":
            yield f"{where} meta l4proto {{ icmp, ipv6-icmp }} {verdict}"
            continue
        ports = ", ".join(f"{first}-{last}" for first, last in rule.ports) or "0-65535"
        for transport in (rule.transport,) if rule.transport else ("tcp", "udp"):
            yield f"{where} {transport} dport {{ {ports} }} {verdict}"


def opened_host_ports(owner: Owner) -> Iterator[str]:
    """Conditions under which the host's loopback is open to a machine: source and port."""
    for rule in owner.policy.rules:
        address = rule.cidr.partition("/")[0]
        if rule.action != "allow" or ":" in address or not address:
            continue
        if not ipaddress.ip_address(address).is_loopback or rule.transport == "icmp":
            continue
        ports = ", ".join(f"{first}-{last}" for first, last in rule.ports) or "1-52, 54-65535"
        for where in _sources(owner, rule.cidr):
            for transport in (rule.transport,) if rule.transport else ("tcp", "udp"):
                yield f"{where}{transport} dport {{ {ports} }}"

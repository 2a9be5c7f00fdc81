"""Rules of the host's kernel, in tables of our own: nothing outside of them is ever touched.

Each network has a table ``inet`` for what passes through the host, and a table ``bridge`` that
holds each machine to its own addresses. They are written whole and at once (``nft -f``).

Source: ``nft(8)``.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ringfence.errors import HostError, UnsupportedError
from ringfence.network.options import PublishedPort
from ringfence.network.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ringfence.network.policy import Rule
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["Passage", "apply", "counters", "delete", "egress_rules", "hold"]

# Providers' metadata and agent addresses; link-local is never forwarded anyway.
_CLOSED = {
    4: "{ 169.254.0.0/16, 100.100.100.200, 168.63.129.16, 192.0.0.192 }",
    6: "{ fe80::/10, fd00:ec2::254, fd20:ce::254 }",
}
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What passes through the host.

    Args:
        outside: Machines reach outside.
        inside: Outside reaches machines.
        host: Machines reach the host.
        translate: Machines are seen outside by the host's address.
    """

    outside: bool
    inside: bool
    host: bool
    translate: bool


def _nft(*words: str, script: str = "") -> str:
    program = shutil.which("nft") or "/usr/sbin/nft"
    try:
        done = subprocess.run(
            [program, *words],
            input=script,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        message = "the program nft is missing"
        raise UnsupportedError(message, hint="apt install nftables") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        message = f"the host's kernel refuses the network's rules: {said[0] if said else ''}"
        raise HostError(message, hint="modprobe nf_tables nft_chain_nat nft_masq")
    return done.stdout


def _write(lines: Iterable[str]) -> None:
    """All of it or nothing."""
    _nft("-f", "-", script="\n".join(lines) + "\n")


def apply(
    table: str, bridge: str, spec: NetworkSpec, passage: Passage, members: Sequence[Member]
) -> None:
    """Writes a network's tables anew; counts begin again.

    Raises:
        HostError: The kernel refuses.
        UnsupportedError: A rule is about a name, or there is no nft.
    """
    lines = [f"add table inet {table}", f"delete table inet {table}", f"table inet {table} {{"]
    lines += _counters()
    lines += _forward(bridge, passage)
    lines += egress_rules(spec, members)
    lines += _input(bridge, passage)
    lines += _translate(bridge, spec, passage, members)
    lines += ["}", *_own_addresses(table, members)]
    _write(lines)


def hold(table: str, members: Sequence[Member]) -> None:
    """Writes only the table that holds machines to their own addresses.

    Raises:
        HostError: The kernel refuses.
    """
    _write(_own_addresses(table, members))


def delete(table: str) -> None:
    """Takes a network's tables away, if they are there.

    Raises:
        HostError: The kernel refuses.
    """
    _write(
        f"{word} table {kind} {table}" for kind in ("inet", "bridge") for word in ("add", "delete")
    )


def counters(table: str) -> dict[str, int]:
    """How many packets were refused, by reason."""
    found = json.loads(_nft("-j", "list", "counters", "table", "inet", table))
    return {
        str(one["counter"]["name"]): int(one["counter"]["packets"])
        for one in cast("list[dict[str, dict[str, str]]]", found.get("nftables", []))
        if "counter" in one
    }


def _counters() -> Iterator[str]:
    for name in ("closed", "denied", "not_allowed", "host", "inbound"):
        yield f"counter {name} {{ }}"


def _forward(bridge: str, passage: Passage) -> Iterator[str]:
    for name in ("closed", "denied", "not_allowed", "host", "inbound"):
        yield f"chain refuse_{name} {{"
        yield f'limit rate 5/second log prefix "ringfence {name}: "'
        yield f"counter name {name}"
        yield "meta l4proto tcp reject with tcp reset"
        yield "reject with icmpx admin-prohibited"
        yield "}"
    yield "chain forward { type filter hook forward priority filter; policy accept;"
    yield f'iifname "{bridge}" oifname "{bridge}" accept'
    yield f'iifname "{bridge}" ct state established,related accept'
    yield f'oifname "{bridge}" ct state established,related accept'
    yield f'iifname "{bridge}" jump {"egress" if passage.outside else "refuse_not_allowed"}'
    yield f'oifname "{bridge}" ct status dnat accept'
    if not passage.inside:
        yield f'oifname "{bridge}" jump refuse_inbound'
    yield "}"


def egress_rules(spec: NetworkSpec, members: Sequence[Member]) -> Iterator[str]:
    """The rules about who machines may reach, as nft's lines.

    Raises:
        UnsupportedError: A rule is about a name.
    """
    policy = Policy(allow=spec.allow, deny=spec.deny)
    own = [Policy(allow=member.allow, deny=member.deny) for member in members]
    opened = [
        line
        for one in (policy, *own)
        for rule in one.rules
        if rule.action == "allow" and rule.cidr and _is_closed(rule.cidr)
        for line in _rule(rule, "return")
    ]
    yield "chain closed_addresses {"
    yield from opened
    yield f"ip daddr {_CLOSED[4]} jump refuse_closed"
    yield f"ip6 daddr {_CLOSED[6]} jump refuse_closed"
    yield "}"
    for number, one in enumerate(own):
        yield f"chain machine_{number} {{"
        yield from _chain(one, "return")
        yield "}"
    yield "chain egress {"
    yield "jump closed_addresses"
    for number, (member, one) in enumerate(zip(members, own, strict=True)):
        if one.rules:
            for address in member.addresses:
                family = "ip6" if ":" in address else "ip"
                yield f"{family} saddr {address} jump machine_{number}"
    yield from _chain(policy, "accept")
    yield "}"


def _is_closed(cidr: str) -> bool:
    return cidr.startswith(("169.254.", "fd00:ec2:", "100.100.100.200", "168.63.129.16"))


def _chain(policy: Policy, admit: str) -> Iterator[str]:
    for rule in policy.rules:
        yield from _rule(rule, "jump refuse_denied" if rule.action == "deny" else admit)
    if policy.refuses_by_default:
        yield "jump refuse_not_allowed"


def _rule(rule: Rule, verdict: str) -> Iterator[str]:
    if not rule.cidr:
        message = f"the rule {str(rule)!r} is about a name, which the host's kernel doesn't see"
        raise UnsupportedError(message, hint="use --network user, or a network of the mode user")
    family = "ip6" if ":" in rule.cidr else "ip"
    where = f"{family} daddr {rule.cidr}"
    if not rule.ports and rule.transport is None:
        yield f"{where} {verdict}"
        return
    if rule.transport == "icmp":
        yield f"{where} meta l4proto {{ icmp, ipv6-icmp }} {verdict}"
        return
    ports = ", ".join(f"{first}-{last}" for first, last in rule.ports) or "0-65535"
    for transport in (rule.transport,) if rule.transport else ("tcp", "udp"):
        yield f"{where} {transport} dport {{ {ports} }} {verdict}"


def _input(bridge: str, passage: Passage) -> Iterator[str]:
    yield "chain input { type filter hook input priority filter; policy accept;"
    if not passage.host:
        yield f'iifname != "{bridge}" accept'
        yield "ct state established,related accept"
        yield "meta l4proto { icmp, ipv6-icmp } accept"
        yield "udp dport { 53, 67 } accept"
        yield "tcp dport 53 accept"
        yield "jump refuse_host"
    yield "}"


def _translate(
    bridge: str, spec: NetworkSpec, passage: Passage, members: Sequence[Member]
) -> Iterator[str]:
    yield "chain postrouting { type nat hook postrouting priority srcnat; policy accept;"
    for subnet in spec.subnets if passage.translate else ():
        family = f"ip{'6' if ':' in subnet else ''}"
        yield f'{family} saddr {subnet} oifname != "{bridge}" masquerade'
    # The host's own programs come by its loopback.
    yield f'oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade'
    yield "}"
    for name, hook, priority in (
        ("prerouting", "prerouting", "dstnat"),
        ("output", "output", "-100"),
    ):
        yield f"chain {name} {{ type nat hook {hook} priority {priority}; policy accept;"
        for member in members:
            yield from _published(member)
        yield "}"


def _published(member: Member) -> Iterator[str]:
    for text in member.publish:
        port = PublishedPort.parse(text)
        own = [ip for ip in member.addresses if (":" in ip) == (":" in port.address)]
        for address in own:
            family = "ip6" if ":" in address else "ip"
            where = f"{family} daddr {port.address} "
            if ipaddress.ip_address(port.address).is_unspecified:
                where = "fib daddr type local "
            target = f"[{address}]:{port.guest}" if family == "ip6" else f"{address}:{port.guest}"
            yield f"meta nfproto {'ipv6' if family == 'ip6' else 'ipv4'} {where}{port.transport} dport {port.host} dnat {family} to {target}"


def _own_addresses(table: str, members: Sequence[Member]) -> Iterator[str]:
    """Holds each machine to its own addresses, and to being no router and no DHCP server."""
    yield f"add table bridge {table}"
    yield f"delete table bridge {table}"
    yield f"table bridge {table} {{"
    yield "chain own { type filter hook prerouting priority -300; policy accept;"
    for number, member in enumerate(members):
        if member.link:
            yield f'iifname "{member.link}" jump machine_{number}'
    yield "}"
    for number, member in enumerate(members):
        v4 = [ip for ip in member.addresses if ":" not in ip]
        v6 = [ip for ip in member.addresses if ":" in ip]
        yield f"chain machine_{number} {{"
        yield f"ether saddr != {member.mac} drop"
        yield "udp sport { 67, 547 } drop"
        yield "icmpv6 type { nd-router-advert, nd-redirect } drop"
        if v4:
            yield f"arp saddr ip != {{ 0.0.0.0, {', '.join(v4)} }} drop"
            yield f"ip saddr != {{ 0.0.0.0, {', '.join(v4)} }} drop"
        if v6:
            yield f"ip6 saddr != {{ ::, fe80::/10, {', '.join(v6)} }} drop"
            # The target's address, by its place: older versions of nft have no name for it.
            advert = "icmpv6 type nd-neighbor-advert"
            for ip in v6:
                yield f"{advert} @th,64,128 {int(ipaddress.IPv6Address(ip)):#x} accept"
            # fe80::/10
            yield f"{advert} @th,64,10 0x3fa accept"
            yield f"{advert} drop"
        yield "}"
    yield "}"

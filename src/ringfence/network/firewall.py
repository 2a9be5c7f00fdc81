"""Rules of the host's kernel, in tables of our own: nothing outside of them is ever touched.

Each network has a table ``inet`` for what passes through the host, and a table ``bridge`` that
holds each machine to its own addresses and its bandwidth.

Source: ``nft(8)``, ``Documentation/networking/ip-sysctl.rst`` (``route_localnet``).
"""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ringfence.errors import HostError
from ringfence.network import egress, relay, tables
from ringfence.network.options import PublishedPort
from ringfence.network.tables import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ringfence.network.store import Member, NetworkSpec

__all__ = ["Passage", "apply", "counters", "delete", "own_addresses", "refusals"]

delete = tables.delete
_FIRST = "type filter hook prerouting priority -300; policy accept;"


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


def apply(
    table: str,
    bridge: str,
    spec: NetworkSpec,
    passage: Passage,
    members: Sequence[Member],
    relayed_by: Sequence[str],
) -> None:
    """Writes a network's tables anew; what was counted stays.

    Args:
        table: Their name.
        bridge: The network's.
        spec: The network.
        passage: What passes.
        members: Who is on it.
        relayed_by: Where connections are looked at that are open by their names.

    Raises:
        HostError: The kernel refuses.
        UnsupportedError: There is no nft.
    """
    inet = Table(family="inet", name=table)
    everyone = egress.owners(spec, members)
    egress.add_refusals(inet, spec.name, rejects=True)
    egress.add_chains(inet, everyone)
    # The bridge lets packets to the loopback's addresses in, for published ports: not the guests'.
    loopback = f'iifname "{bridge}" ip {{}} 127.0.0.0/8 jump drop_loopback'
    inet.chain("drop_loopback", ["counter name loopback", "drop"])
    inet.chain("first", [loopback.format("daddr"), loopback.format("saddr")], _FIRST)
    forward = "type filter hook forward priority filter; policy accept;"
    inet.chain("forward", _forward(bridge, passage), forward)
    inside = "type filter hook input priority filter; policy accept;"
    ruled = any(owner.policy.says_something for owner in everyone)
    first = [str(ipaddress.ip_network(text)[1]) for text in spec.subnets]
    inet.chain("input", _input(bridge, first, passage, ruled=ruled), inside)
    _translate(inet, bridge, spec, passage, members)
    _open_host(inet, bridge, first, everyone)
    if relayed_by:
        egress.add_inspection(inet, everyone, relayed_by)
        strange = f'iifname "{bridge}" meta l4proto tcp fib daddr type != local'
        inet.chains["prerouting"].append(f"{strange} jump inspect")
        _translate_relayed(inet, bridge, spec, members)
    tables.write(inet, own_addresses(table, members))


def counters(table: str) -> dict[str, int]:
    """How many packets were refused, by reason."""
    found: dict[str, int] = {}
    for family in ("inet", "bridge"):
        for kind, fields in tables.listed(family, table, terse=True):
            if kind == "counter":
                name = str(fields["name"])
                found[name] = found.get(name, 0) + int(str(fields["packets"]))
    if not found:
        message = f"the table {table} is not there"
        raise HostError(message)
    return found


def refusals(table: str) -> list[dict[str, object]]:
    """What was refused in the last hour: who, whom, why, how often and when last; oldest first."""
    now = time.time()
    found = []
    for family in ("inet", "bridge"):
        for kind, fields in tables.listed(family, table):
            name = str(fields.get("name", ""))
            if kind == "set" and name.startswith("refused_"):
                reason = name.removeprefix("refused_").removesuffix("_other")[:-2]
                elements = cast("list[dict[str, dict[str, object]]]", fields.get("elem", []))
                reason = reason.replace("_", "-")
                found += [_refusal(one["elem"], reason, now) for one in elements]
    return sorted(found, key=lambda one: float(str(one["time"])))


def _refusal(element: dict[str, object], reason: str, now: float) -> dict[str, object]:
    key = cast("dict[str, list[object]]", element["val"])["concat"]
    source, destination, transport, *port = (str(part) for part in key)
    if port:
        destination = f"[{destination}]" if ":" in destination else destination
        destination += f":{port[0]}"
    counted = cast("dict[str, object]", element.get("counter", {}))
    age = int(str(element.get("timeout", 0))) - int(str(element.get("expires", 0)))
    return {
        "time": now - age,
        "address": source,
        "transport": transport,
        "destination": destination,
        "reason": reason,
        "packets": counted.get("packets", 1),
    }


def _forward(bridge: str, passage: Passage) -> Iterator[str]:
    yield f'iifname "{bridge}" oifname "{bridge}" accept'
    yield f'iifname "{bridge}" ct state established,related accept'
    yield f'oifname "{bridge}" ct state established,related accept'
    yield f'iifname "{bridge}" jump {"egress" if passage.outside else "refuse_not_allowed"}'
    yield f'oifname "{bridge}" ct status dnat accept'
    if not passage.inside:
        yield f'oifname "{bridge}" jump refuse_inbound'


def _input(bridge: str, first: Sequence[str], passage: Passage, *, ruled: bool) -> Iterator[str]:
    if passage.host and not ruled:
        return
    yield f'iifname != "{bridge}" accept'
    yield "ct state established,related accept"
    yield "ct status dnat accept"
    yield "meta l4proto { icmp, ipv6-icmp } accept"
    yield "udp dport 67 accept"
    for address in first:
        family = "ip6" if ":" in address else "ip"
        for transport in ("udp", "tcp"):
            yield f"{family} daddr {address} {transport} dport 53 accept"
    yield "jump egress" if passage.host else "jump refuse_host"


def _translate(
    inet: Table, bridge: str, spec: NetworkSpec, passage: Passage, members: Sequence[Member]
) -> None:
    lines = []
    for subnet in spec.subnets if passage.translate else ():
        family = f"ip{'6' if ':' in subnet else ''}"
        lines.append(f'{family} saddr {subnet} oifname != "{bridge}" masquerade')
    # The host's own programs come by its loopback.
    lines.append(f'oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade')
    inet.chain("postrouting", lines, "type nat hook postrouting priority srcnat; policy accept;")
    published = [line for member in members for line in _published(member)]
    for hook, priority in (("prerouting", "dstnat"), ("output", "-100")):
        inet.chain(hook, published, f"type nat hook {hook} priority {priority}; policy accept;")


def _translate_relayed(
    inet: Table, bridge: str, spec: NetworkSpec, members: Sequence[Member]
) -> None:
    """Connections that the relay passes on are seen by their machines' addresses."""
    untag = []
    tags = relay.tags(spec, members)
    for subnet in spec.subnets if tags else ():
        family = "ip6" if ":" in subnet else "ip"
        own = ipaddress.ip_network(subnet)[1]
        for member in members:
            if (tag := tags.get(member.machine_id)) is None:
                continue
            mine = next(one for one in member.addresses if (":" in one) == (":" in subnet))
            where = f'oifname != "{bridge}" {family} saddr {own} {family} dscp {tag}'
            inet.chains["postrouting"].append(f"{where} snat {family} to {mine}")
        untag.append(f'oifname != "{bridge}" ct original {family} saddr {own} {family} dscp set 0')
    if untag:
        inet.chain("untag", untag, "type filter hook postrouting priority 300; policy accept;")


def _open_host(
    inet: Table, bridge: str, first: Sequence[str], everyone: Sequence[egress.Owner]
) -> None:
    """What was opened of the host's loopback is reached at the host's address on the network."""
    v4 = next((address for address in first if ":" not in address), None)
    for owner in everyone if v4 else ():
        inet.chains["prerouting"] += [
            f'iifname "{bridge}" ip daddr {v4} {where} dnat ip to 127.0.0.1'
            for where in egress.opened_host_ports(owner)
        ]


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
            version = f"meta nfproto ipv{'6' if family == 'ip6' else '4'}"
            yield (f"{version} {where}{port.transport} dport {port.host} dnat {family} to {target}")


def own_addresses(table: str, members: Sequence[Member]) -> Table:
    """Holds each machine to its own addresses, to being no router and no DHCP server.

    Returns:
        A table with a chain ``machine_NUMBER`` for each; what it lets through is accepted.
    """
    held = Table(family="bridge", name=table, counters=("spoofed",))
    held.chain("refuse_spoofed", ["counter name spoofed", "drop"])
    jumps, limits = [], []
    for number, member in enumerate(members):
        if not member.link:
            continue
        rate = "limit rate over {} bytes/second burst {} bytes drop"
        if member.send_bytes_per_s is not None:
            burst = _burst(member.send_bytes_per_s)
            jumps.append(f'iifname "{member.link}" {rate.format(member.send_bytes_per_s, burst)}')
        if member.receive_bytes_per_s is not None:
            burst = _burst(member.receive_bytes_per_s)
            limit = rate.format(member.receive_bytes_per_s, burst)
            limits.append(f'oifname "{member.link}" {limit}')
        jumps.append(f'iifname "{member.link}" jump machine_{number}')
        held.chain(f"machine_{number}", _claims(member))
    held.chain("own", jumps, _FIRST)
    if limits:
        held.chain("limits", limits, "type filter hook postrouting priority 0; policy accept;")
    return held


def _burst(bytes_per_s: int) -> int:
    """A tenth of a second's worth, and room for a few segments that are yet to be split."""
    return max(bytes_per_s // 10, 256 << 10)


def _claims(member: Member) -> Iterator[str]:
    v4 = [ip for ip in member.addresses if ":" not in ip]
    v6 = [ip for ip in member.addresses if ":" in ip]
    no = "jump refuse_spoofed"
    yield f"ether saddr != {member.mac} {no}"
    # Groups that bridges keep to themselves: nobody behind one is a machine's to speak to.
    yield f"ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 {no}"
    # Neither tags of other networks nor protocols that nobody here looks at.
    yield f"ether type != {{ ip, ip6, arp }} {no}"
    yield f"udp sport {{ 67, 547 }} {no}"
    yield f"icmpv6 type {{ nd-router-advert, nd-redirect }} {no}"
    if v4:
        yield f"arp saddr ip != {{ 0.0.0.0, {', '.join(v4)} }} {no}"
        yield f"ip saddr != {{ 0.0.0.0, {', '.join(v4)} }} {no}"
    if v6:
        yield f"ip6 saddr != {{ ::, fe80::/10, {', '.join(v6)} }} {no}"
        # The target's address, by its place: older versions of nft have no name for it.
        advert = "icmpv6 type nd-neighbor-advert"
        for ip in v6:
            yield f"{advert} @th,64,128 {int(ipaddress.IPv6Address(ip)):#x} return"
        # fe80::/10
        yield f"{advert} @th,64,10 0x3fa return"
        yield f"{advert} {no}"

"""Mode ``bridge:IF``: machines are on the LAN that an interface of the host is on. Needs root.

An interface that is a bridge, or is on one, is joined. Another becomes a port of a bridge of ours
for as long as machines are on it, and the host's addresses move there (:mod:`ringfence.network.lan`).
The LAN tells machines their addresses; they are held to their own Ethernet address alone. Where
rules are about names, the host tells those (:mod:`ringfence.network.lan_rules`).
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, UnsupportedError
from ringfence.guest.spec import InterfaceSpec
from ringfence.network import (
    addresses,
    dhcp,
    dnsmasq,
    firewall,
    kernel,
    lan,
    lan_rules,
    links,
    names,
    relay,
)
from ringfence.network.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

    from ringfence.network.attachment import Attachment
    from ringfence.network.options import AttachOptions, Kind
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["check", "down", "join", "settle"]

_LOG = logging.getLogger(__name__)


def check(spec: NetworkSpec) -> None:
    """See :class:`ringfence.network.manage.Mode`.

    Raises:
        NotFoundError: There is no such interface.
        UnsupportedError: It takes root, the interface can't be on a bridge, or a rule can't be held.
    """
    links.require_rights("bridge")
    lan.check(spec.interface)
    if spec.policy.about_names:
        _doors_at(lan.master_of(spec.interface) or spec.interface)


def _doors_at(bridge: str) -> list[str]:
    """The host's addresses on a LAN, one of each version at most, where it tells names.

    Raises:
        UnsupportedError: It has none.
    """
    found = lan.own_addresses(bridge)
    first = [next((one for one in found if (":" in one) == six), "") for six in (False, True)]
    own = [one for one in first if one]
    if not own:
        message = f"rules about names need the host to tell them, and it has no address on {bridge}"
        hint = f"ip addr add ADDRESS/PREFIX dev {bridge}; or use --network nat or user"
        raise UnsupportedError(message, hint=hint)
    return own


def join(
    spec: NetworkSpec, member: Member, kind: Kind, options: AttachOptions, stack: ExitStack
) -> Attachment:
    """See :class:`ringfence.network.manage.Mode`.

    Raises:
        ConfigError: The machine asks for what a LAN's peer doesn't have.
        UnsupportedError: A rule can't be held.
    """
    check(spec)
    if options.publish:
        message = "a machine on the LAN is reached at its own address, not at ports of the host"
        raise ConfigError(message, hint="leave --publish out, or use --network nat or user")
    told_by: tuple[str, ...] = ()
    if spec.policy.about_names or options.policy.about_names:
        told_by = tuple(_doors_at(lan.master_of(spec.interface) or spec.interface))
    lan.join(spec.interface, kernel.bridge_of(spec), kernel.table_of(spec))
    bridge = kernel.bridge_of(spec)
    interface = _interface(bridge, member, options, stack)
    interface = dataclasses.replace(interface, mtu=spec.mtu)
    if told_by:
        interface = dataclasses.replace(interface, dns=told_by)
    known = tuple(text.partition("/")[0] for text in interface.addresses)
    # A VM's own system may ask the LAN for others; a container has what it was given.
    held = kind == "container" or bool(options.addresses)
    member = dataclasses.replace(member, addresses=known, routers=interface.gateways, held=held)
    if told_by and not _is_router(member, bridge) and lan.router_on(bridge, 4) is None:
        _LOG.warning(
            "this host has no way outside by %s: by a name alone, machines reach hosts of that LAN",
            bridge,
        )
    return kernel.plug(spec, member, kind, interface, (options, []), stack)


def _is_router(member: Member, bridge: str) -> bool:
    """Whether this host is a machine's way outside."""
    return not set(member.routers).isdisjoint(lan.own_addresses(bridge))


def _interface(
    bridge: str, member: Member, options: AttachOptions, stack: ExitStack
) -> InterfaceSpec:
    if options.addresses:
        return _given(bridge, member, options)
    lease = dhcp.ask(bridge, member.mac, options.hostname or options.name)
    if lease is None:
        _LOG.warning(
            "nobody on the LAN of %s tells machines their IPv4 addresses; give one: --ip", bridge
        )
        return InterfaceSpec(mac=member.mac, dns=options.dns)
    renewal = dhcp.Renewal(bridge, member.mac, options.hostname or options.name, lease)
    stack.callback(renewal.close)
    return InterfaceSpec(
        mac=member.mac,
        addresses=(lease.address,),
        gateways=lease.routers,
        dns=options.dns or lease.nameservers,
    )


def _given(bridge: str, member: Member, options: AttachOptions) -> InterfaceSpec:
    found, routers = [], []
    for text in options.addresses:
        address = lan.address_on(bridge, text)
        if address is None:
            message = f"the prefix of {text} on the LAN of {bridge} isn't known"
            raise ConfigError(message, hint=f"write it: {text}/24")
        found.append(address)
        own = ipaddress.ip_interface(address)
        router = lan.router_on(bridge, own.version)
        if router is not None and ipaddress.ip_address(router) in own.network:
            routers.append(router)
    return InterfaceSpec(
        mac=member.mac, addresses=tuple(found), gateways=tuple(routers), dns=options.dns
    )


def settle(
    spec: NetworkSpec,
    members: Sequence[Member],
    known: Mapping[str, list[str]],
) -> None:
    """Holds those who are there to their own addresses and rules."""
    if not members:
        return
    folder, table, bridge = Store().folder(spec.name), kernel.table_of(spec), kernel.bridge_of(spec)
    servers = lan.servers_on(bridge, addresses.host_nameservers())
    host = lan_rules.Lan(table=table, bridge=bridge, own=lan.own_addresses(bridge), servers=servers)
    # Whoever had doors keeps them: its name server is there, and maybe connections.
    had = names.doors(folder).keys() | relay.doors(spec).keys()
    led = {
        name: one
        for one in members
        if (name := one.name or one.machine_id) in had or lan_rules.about_names(spec, one)
    }
    if led:
        own = _doors_at(bridge)
        told = {dnsmasq.HOST_NAME: own, **known}
        doors = {name: (one, own) for name, one in led.items()}
        # The sets that the name server fills have to be there.
        by_lan = {name for name, one in led.items() if not _is_router(one, bridge)}
        relayed = relay.apply_doors(spec, led, own, by_lan)
        asked = names.apply_doors(folder, table, spec, doors, told)
        host = dataclasses.replace(host, names=asked, relay=relayed)
    lan_rules.hold(host, spec, members)


def down(spec: NetworkSpec) -> None:
    """Takes the rules away, and gives the interface back; a bridge of the host stays."""
    relay.stop(spec)
    names.stop(Store().folder(spec.name))
    firewall.delete(kernel.table_of(spec))
    lan.leave(spec.interface, kernel.table_of(spec))

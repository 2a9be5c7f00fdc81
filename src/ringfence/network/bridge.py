"""Mode ``bridge:IF``: machines are on the LAN that an interface of the host is on. Needs root.

An interface that is a bridge, or is on one, is joined. Another becomes a port of a bridge of ours
for as long as machines are on it, and the host's addresses move there (:mod:`ringfence.network.lan`).
The LAN tells machines their addresses; they are held to their own Ethernet address alone.
"""

from __future__ import annotations

import ipaddress
import logging
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError
from ringfence.guest.spec import InterfaceSpec
from ringfence.network import dhcp, egress, firewall, kernel, lan, links
from ringfence.network.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack
    from pathlib import Path

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
    egress.check_lan(spec.policy)


def _record(spec: NetworkSpec) -> Path:
    return Store().folder(spec.name) / "moved.json"


def join(
    spec: NetworkSpec, member: Member, kind: Kind, options: AttachOptions, stack: ExitStack
) -> Attachment:
    """See :class:`ringfence.network.manage.Mode`.

    Raises:
        ConfigError: The machine asks for what a LAN's peer doesn't have.
        UnsupportedError: A rule can't be held.
    """
    check(spec)
    egress.check_lan(options.policy)
    if options.publish:
        message = "a machine on the LAN is reached at its own address, not at ports of the host"
        raise ConfigError(message, hint="leave --publish out, or use --network nat or user")
    if lan.master_of(spec.interface) is None:
        lan.enslave(spec.interface, kernel.bridge_of(spec), _record(spec))
    interface = _interface(kernel.bridge_of(spec), member, options, stack)
    return kernel.plug(spec, member, kind, interface, (options, []), stack)


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
    names: Mapping[str, list[str]],  # noqa: ARG001 - the LAN has its own name servers
) -> None:
    """Holds those who are there to their own addresses and rules."""
    if members:
        firewall.hold(kernel.table_of(spec), spec, members)


def down(spec: NetworkSpec) -> None:
    """Takes the rules away, and gives the interface back; a bridge of the host stays."""
    firewall.delete(kernel.table_of(spec))
    lan.release(_record(spec))

"""Mode ``bridge:IF``: machines are on the LAN that a bridge of the host is on. Needs root.

The LAN tells them their addresses; they are held to their own Ethernet address alone. An
interface that isn't a bridge is left as it is: making it one would take the host's own address
off the LAN for a moment, which is for its administrator to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, UnsupportedError
from ringfence.guest.spec import InterfaceSpec
from ringfence.network import firewall, kernel, links

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from ringfence.network.attachment import Attachment
    from ringfence.network.options import AttachOptions, Kind
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["check", "down", "join", "settle"]


def check(spec: NetworkSpec) -> None:
    """See :class:`ringfence.network.manage.Mode`.

    Raises:
        NotFoundError: There is no such interface.
        UnsupportedError: It takes root, or the interface isn't a bridge.
    """
    links.require_rights("bridge")
    if not links.is_bridge(spec.interface):
        message = f"the interface {spec.interface} is not a bridge, and is left as it is"
        hint = (
            f"make one: ip link add br0 type bridge; ip link set {spec.interface} master br0; "
            "move the host's address to br0; then --network bridge:br0"
        )
        raise UnsupportedError(message, hint=hint)


def join(
    spec: NetworkSpec, member: Member, kind: Kind, options: AttachOptions, stack: ExitStack
) -> Attachment:
    """See :class:`ringfence.network.manage.Mode`.

    Raises:
        ConfigError: The machine asks for what a LAN's peer doesn't have.
    """
    check(spec)
    if options.publish or options.policy.rules or options.dns or options.hosts:
        message = "a machine on the LAN has no ports of the host, rules or names from Ringfence"
        raise ConfigError(message, hint="use --network nat or user for those")
    interface = InterfaceSpec(mac=member.mac)
    return kernel.plug(spec, member, kind, interface, (options, []), stack)


def settle(spec: NetworkSpec, members: Sequence[Member]) -> None:
    """Holds those who are there to their own addresses."""
    firewall.hold(kernel.table_of(spec), members)


def down(spec: NetworkSpec) -> None:
    """Takes the rules away; the bridge is the host's."""
    firewall.delete(kernel.table_of(spec))

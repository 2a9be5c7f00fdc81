"""Which addresses a machine gets: those that it asks for, those kept for it, or free ones."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError
from ringfence.network import addresses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.network.options import AttachOptions
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["check", "choose"]


def _lease(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not (name and equals and address):
        message = f"{text!r} keeps no address for a machine"
        raise ConfigError(message, hint="write NAME=ADDRESS")
    return name, address


def check(spec: NetworkSpec, nets: Sequence[addresses.Network]) -> None:
    """Checks the addresses that a network keeps for machines.

    Raises:
        ConfigError: One can't be kept.
    """
    kept: list[str] = []
    for text in spec.leases:
        _, address = _lease(text)
        addresses.check_wanted(address, nets)
        if address in kept:
            message = f"the address {address} is kept for two machines"
            raise ConfigError(message)
        kept.append(address)


def choose(spec: NetworkSpec, others: Sequence[Member], options: AttachOptions) -> tuple[str, ...]:
    """A machine's addresses, one of each of the network's subnets.

    Raises:
        ConfigError: It can't have what it asks for.
        ConflictError: An address is taken.
    """
    nets = [ipaddress.ip_network(text) for text in spec.subnets]
    leases = [_lease(text) for text in spec.leases]
    own = [address for name, address in leases if name == options.name]
    wanted = [text.partition("/")[0] for text in options.addresses] or own
    addresses.check_all_wanted(wanted, nets)
    used = [address for member in others for address in member.addresses]
    used += [address for name, address in leases if name != options.name]
    return tuple(addresses.free_address(net, [*used, str(net[1])], wanted) for net in nets)

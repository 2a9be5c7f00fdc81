"""What a guest is told of its end of a network."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from ringfence.guest.spec import InterfaceSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.network.store import Member, NetworkSpec

__all__ = ["interface_of"]


def interface_of(
    spec: NetworkSpec, member: Member, *, routed: bool, dns: Sequence[str] = ()
) -> InterfaceSpec:
    """What a guest is told of its end.

    Args:
        spec: The network.
        member: The machine.
        routed: Whether there is a way outside, through the first address of each subnet.
        dns: Name servers; the first address of the IPv4 subnet when there are none.
    """
    nets = [ipaddress.ip_network(text) for text in spec.subnets]
    first = [str(net[1]) for net in nets]
    return InterfaceSpec(
        mac=member.mac,
        addresses=tuple(
            f"{own}/{net.prefixlen}" for own, net in zip(member.addresses, nets, strict=True)
        ),
        gateways=tuple(first) if routed else (),
        dns=tuple(dns or first[:1]),
        mtu=spec.mtu,
    )

"""Mode ``user`` for several machines: one gateway is their switch and their way outside. No root."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, StateError
from ringfence.network import addresses, dnsmasq, gateway, user
from ringfence.network.interfaces import interface_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

    from ringfence.network.attachment import Attachment
    from ringfence.network.gateway import Gateway
    from ringfence.network.options import AttachOptions, Kind
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["check", "down", "join", "settle"]

_UPLINK = {"user": True, "isolated": False}


def check(spec: NetworkSpec) -> None:
    """Any user of any host can have one."""


def _document(spec: NetworkSpec) -> dict[str, object]:
    nets = [ipaddress.ip_network(text) for text in spec.subnets]
    document: dict[str, object] = {
        "version": 1,
        "name": spec.name,
        "mac": addresses.derive_mac(spec.name, "gateway"),
        "mtu": spec.mtu,
        "uplink": _UPLINK[spec.mode],
        "nameservers": addresses.host_nameservers(),
        "policy": spec.policy.document(),
        "exit_when_empty": True,
    }
    for net in nets:
        document[f"ipv{net.version}"] = f"{net[1]}/{net.prefixlen}"
    return document


def _running(spec: NetworkSpec) -> Gateway:
    path, log = user.control_path(spec.name), user.log_path(spec.name)
    return gateway.ensure(path, log, lambda: _document(spec))


def join(
    spec: NetworkSpec, member: Member, kind: Kind, options: AttachOptions, stack: ExitStack
) -> Attachment:
    """See :class:`ringfence.network.manage.Mode`."""
    port: dict[str, object] = {
        "name": member.machine_id,
        "mac": member.mac,
        "addresses": list(member.addresses),
        "hostname": options.hostname,
        "rate": options.rate.document(),
        "policy": options.policy.document() if options.policy.says_something else None,
    }
    routed = _UPLINK[spec.mode]
    interface = interface_of(spec, member, routed=routed, dns=options.dns)
    running = _running(spec)
    stack.callback(running.close)
    stack.callback(_remove_port, running, member.machine_id)
    return user.join(running, port, kind, interface, options, stack)


def _remove_port(running: Gateway, name: str) -> None:
    # It may have seen the machine's end itself.
    with suppress(StateError, ConfigError):
        running.call("remove_port", {"name": name})


def settle(spec: NetworkSpec, members: Sequence[Member], names: Mapping[str, list[str]]) -> None:
    """Tells the gateway the names of those who are there, and takes others' links away."""
    own = [str(ipaddress.ip_network(text)[1]) for text in spec.subnets]
    with suppress(StateError), gateway.connect(user.control_path(spec.name)) as running:
        running.call("set_names", {**names, dnsmasq.HOST_NAME: own})
        running.call("set_policy", spec.policy.document())
        for member in members:
            policy = member.policy
            document = policy.document() if policy.says_something else None
            # A container's link comes when its namespace is there.
            with suppress(ConfigError):
                running.call("set_port_policy", {"name": member.machine_id, "policy": document})


def down(spec: NetworkSpec) -> None:
    """Ends the gateway."""
    gateway.stop(user.control_path(spec.name), user.log_path(spec.name))

"""Mode ``user`` for several machines: one gateway is their switch and their way outside. No root."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, StateError
from ringfence.network import addresses, gateway, manage, user
from ringfence.network.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Sequence
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
        "policy": Policy(allow=spec.allow, deny=spec.deny).document(),
        "exit_when_empty": True,
    }
    for net in nets:
        document[f"ipv{net.version}"] = f"{net[1]}/{net.prefixlen}"
    return document


def _running(spec: NetworkSpec) -> Gateway:
    """The network's gateway, started when it isn't there."""
    path = user.control_path(spec.name)
    try:
        found = gateway.connect(path)
        found.status()
    except StateError:
        log = user.log_path(spec.name)
        return gateway.spawn(_document(spec), [], control_path=path, log=log, owned=False)
    return found


def join(
    spec: NetworkSpec, member: Member, kind: Kind, options: AttachOptions, stack: ExitStack
) -> Attachment:
    """See :class:`ringfence.network.manage.Mode`.

    Raises:
        ConfigError: The machine asks for what a shared gateway doesn't do for one alone.
    """
    if options.policy.rules or options.dns:
        message = f"the network {spec.name} has rules and name servers for all its machines alike"
        hint = "give them to ringfence network create, or run the machine with --network user"
        raise ConfigError(message, hint=hint)
    port: dict[str, object] = {
        "name": member.machine_id,
        "mac": member.mac,
        "addresses": list(member.addresses),
        "hostname": options.hostname,
        "rate": options.rate.document(),
    }
    routed = _UPLINK[spec.mode]
    interface = manage.interface_of(spec, member, routed=routed)
    running = _running(spec)
    stack.callback(running.close)
    stack.callback(_remove_port, running, member.machine_id)
    return user.join(running, port, kind, interface, options, stack)


def _remove_port(running: Gateway, name: str) -> None:
    # It may have seen the machine's end itself.
    with suppress(StateError, ConfigError):
        running.call("remove_port", {"name": name})


def settle(spec: NetworkSpec, members: Sequence[Member]) -> None:
    """Tells the gateway the names of those who are there, and takes others' links away."""
    names = {member.name: list(member.addresses) for member in members if member.name}
    with suppress(StateError), gateway.connect(user.control_path(spec.name)) as running:
        running.call("set_names", names)


def down(spec: NetworkSpec) -> None:
    """Ends the gateway."""
    path = user.control_path(spec.name)
    with suppress(StateError), gateway.connect(path) as running:
        running.call("stop")
    with suppress(OSError):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        user.log_path(spec.name).unlink(missing_ok=True)

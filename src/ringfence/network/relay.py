"""The relay of a network of the host's kernel that has rules about names.

The packet filter knows which addresses were answered for a name, not which name a connection is
for: it leads such connections to a process that looks at what they say first and passes them on
(``set_relay`` in docs/reference/gateway.md).
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, cast

from ringfence.errors import HostError, StateError
from ringfence.network import addresses, gateway, user

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from ringfence.network.gateway import Gateway
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["BY_LAN", "apply", "apply_doors", "doors", "refusals", "stop", "tags"]

_BACKLOG = 1024
# Descriptors in one message are few.
_DOORS_AT_ONCE = 12
# Values of a packet's DSCP but for the usual one (RFC 2474).
_TAGS = 63
# Marks connections that may leave by the machine's LAN alone: one of those values that are for use
# on one's own links (RFC 2474 §6).
BY_LAN = 43


def apply(spec: NetworkSpec, members: Sequence[Member], first: Sequence[str]) -> list[str]:
    """Tells the relay who is on the network and what holds; starts it when it doesn't run.

    Args:
        spec: The network.
        members: Who is on it.
        first: The host's address in each subnet.

    Returns:
        Where it takes connections: ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``.

    Raises:
        HostError: It can't be started.
    """
    tagged = tags(spec, members)
    machines = [
        {
            **_machine(one),
            "addresses": list(one.addresses),
            "tag": tagged.get(one.machine_id),
        }
        for one in members
    ]
    with ExitStack() as stack:
        running = stack.enter_context(_running(spec))
        listening = _listening(running)
        fds = []
        if not listening:
            fds = [stack.enter_context(_listener(address)).fileno() for address in first]
        running.call("set_policy", spec.policy.document())
        running.call("set_relay", {"listen": [*range(len(fds))], "machines": machines}, fds)
        return listening or _listening(running)


def _machine(one: Member) -> dict[str, object]:
    policy = one.policy.document() if one.policy.says_something else None
    return {"name": one.name or one.machine_id, "policy": policy}


def doors(spec: NetworkSpec) -> dict[str, list[str]]:
    """By machines' names where the relay takes their connections alone; none if it doesn't run."""
    with suppress(StateError), gateway.connect(user.control_path(spec.name)) as running:
        return _doors(running)
    return {}


def apply_doors(
    spec: NetworkSpec,
    machines: Mapping[str, Member],
    own: Sequence[str],
    by_lan: Container[str],
) -> dict[str, list[str]]:
    """Tells the relay of a LAN's machines, each of which comes by doors of its own.

    Args:
        spec: The network.
        machines: Those whose connections are looked at, by their names.
        own: The host's addresses, at most one of each version.
        by_lan: Those whose connections leave by the LAN alone.

    Returns:
        By machines' names where their doors are: ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``.

    Raises:
        HostError: It can't be started.
    """
    if any(_hosts(at) != set(own) for at in doors(spec).values()):
        # The host has moved, and what passed by its old addresses has ended.
        stop(spec)
    with _running(spec, own) as running:
        running.call("set_policy", spec.policy.document())
        known = _doors(running)
        fresh = [(name, address) for name in machines if name not in known for address in own]
        while True:
            now, fresh = fresh[:_DOORS_AT_ONCE], fresh[_DOORS_AT_ONCE:]
            _open_doors(running, machines, now, by_lan)
            if not fresh:
                return _doors(running)


def _open_doors(
    running: Gateway,
    machines: Mapping[str, Member],
    fresh: Sequence[tuple[str, str]],
    by_lan: Container[str],
) -> None:
    told = {
        name: {**_machine(one), "listen": [], "tag": BY_LAN if name in by_lan else None}
        for name, one in machines.items()
    }
    with ExitStack() as stack:
        fds: list[int] = []
        for name, address in fresh:
            cast("list[int]", told[name]["listen"]).append(len(fds))
            fds.append(stack.enter_context(_listener(address)).fileno())
        running.call("set_relay", {"machines": list(told.values())}, fds)


def _hosts(doors: Sequence[str]) -> set[str]:
    return {at.rpartition(":")[0].removeprefix("[").removesuffix("]") for at in doors}


def tags(spec: NetworkSpec, members: Sequence[Member]) -> dict[str, int]:
    """By which the packet filter knows whose a connection is that the relay passes on.

    Only where machines are seen by their own addresses. There are 63; in a network of more
    machines some are seen by the host's address there.
    """
    found: dict[int, str] = {}
    for one in members if spec.mode == "routed" else ():
        # The same one for as long as the machine is there, whoever comes and goes.
        tag = int(ipaddress.ip_address(one.addresses[0])) % _TAGS + 1
        found.setdefault(tag, one.machine_id)
    return {machine_id: tag for tag, machine_id in found.items()}


def _running(spec: NetworkSpec, own: Sequence[str] = ()) -> Gateway:
    path, log = user.control_path(spec.name), user.log_path(spec.name)
    return gateway.ensure(path, log, lambda: _document(spec, own))


def _document(spec: NetworkSpec, own: Sequence[str]) -> dict[str, object]:
    document: dict[str, object] = {
        "version": 1,
        "name": spec.name,
        "mac": addresses.derive_mac(spec.name, "relay"),
    }
    for net in map(ipaddress.ip_network, spec.subnets):
        document[f"ipv{net.version}"] = f"{net[1]}/{net.prefixlen}"
    for address in own:
        # How large the LAN is doesn't matter: no links are there.
        document["ipv6" if ":" in address else "ipv4"] = f"{address}/24"
    return document


def _doors(running: Gateway) -> dict[str, list[str]]:
    relay = cast("dict[str, dict[str, list[str]]]", running.status()["relay"])
    return relay["doors"]


def _listening(running: Gateway) -> list[str]:
    relay = cast("dict[str, list[str]]", running.status()["relay"])
    return relay["listening"]


def _listener(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.bind((address, 0))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        message = f"cannot listen at the network's address {address}: {error.strerror}"
        raise HostError(message, errno=error.errno) from error
    return bound


def refusals(spec: NetworkSpec) -> tuple[dict[str, int], list[dict[str, object]]]:
    """What it refused: counts by reason, and the last ones."""
    with suppress(StateError), gateway.connect(user.control_path(spec.name)) as running:
        found = running.refusals()
        counts = cast("dict[str, int]", found["counts"])
        return counts, cast("list[dict[str, object]]", found["recent"])
    return {}, []


def stop(spec: NetworkSpec) -> None:
    """Ends it, if it runs."""
    gateway.stop(user.control_path(spec.name), user.log_path(spec.name))

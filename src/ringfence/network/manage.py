"""Networks: made, listed, joined, healed and removed."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from ringfence.errors import ConfigError, ConflictError, RingfenceError
from ringfence.network import addresses, leases, links, user
from ringfence.network.options import name_of
from ringfence.network.store import MODES, Member, NetworkSpec, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.network.attachment import Attachment
    from ringfence.network.options import AttachOptions, Kind
    from ringfence.network.policy import Policy

__all__ = ["attach", "create", "heal", "remove", "set_machine_policy", "set_policy"]

_MODULES = {
    "user": "ringfence.network.shared",
    "isolated": "ringfence.network.isolated",
    "nat": "ringfence.network.nat",
    "host-only": "ringfence.network.host_only",
    "routed": "ringfence.network.routed",
    "bridge": "ringfence.network.bridge",
}


# Through memory nothing has to be split; the host's links are Ethernet.
_MAX_MTU = 65520
_MTU = {"user": _MAX_MTU, "isolated": _MAX_MTU}


Names = dict[str, list[str]]


class Mode(Protocol):
    """What a mode's module offers; the store is locked whenever it is called."""

    def check(self, spec: NetworkSpec) -> None:
        """Whether this host and user can have such a network; nothing is made."""

    def join(
        self,
        spec: NetworkSpec,
        member: Member,
        kind: Kind,
        options: AttachOptions,
        stack: ExitStack,
    ) -> Attachment:
        """Brings the network up if need be, and a machine onto it."""

    def settle(self, spec: NetworkSpec, members: Sequence[Member], names: Names) -> None:
        """Tells the network which machines are on it now, and the names that it answers."""

    def down(self, spec: NetworkSpec) -> None:
        """Takes away all that the network put on the host; may be called again."""


def mode_of(spec: NetworkSpec) -> Mode:
    """The module of a network's mode."""
    return cast("Mode", import_module(_MODULES[spec.mode]))


def _taken(store: Store) -> list[tuple[str, addresses.Network]]:
    found = []
    for name in store.names():
        if (spec := store.get(name)) is not None:
            found += [(name, ipaddress.ip_network(text)) for text in spec.subnets]
    return found


def complete(spec: NetworkSpec, store: Store) -> NetworkSpec:
    """The network with all that was left out chosen, and what was said checked.

    Raises:
        ConfigError: Something isn't possible.
        ConflictError: A subnet overlaps another.
    """
    if spec.mode not in MODES:
        message = f"there is no mode {spec.mode!r}"
        raise ConfigError(message, hint=f"choose one of {', '.join(MODES)}")
    if spec.mtu == 0:
        # A bridge's packets are as large as those of all its ports: the host's own are on a LAN.
        lan = links.mtu_of(spec.interface) if spec.mode == "bridge" else None
        mtu = min(lan or _MTU.get(spec.mode, 1500), _MAX_MTU)
        spec = dataclasses.replace(spec, mtu=mtu)
    if not 1280 <= spec.mtu <= _MAX_MTU:
        message = f"the largest packet is 1280 to {_MAX_MTU} bytes, not {spec.mtu}"
        raise ConfigError(message)
    if (spec.mode == "bridge") != bool(spec.interface):
        message = "the mode bridge, and no other, is on an interface of the host"
        raise ConfigError(message, hint="--mode bridge --interface IF")
    # Rules that can't be understood are refused here.
    _ = spec.policy
    if spec.mode == "bridge":
        if spec.subnets or spec.leases:
            message = "a network of the mode bridge has the LAN's addresses, not its own"
            raise ConfigError(message, hint="a machine may ask for one: --ip ADDRESS/PREFIX")
        return spec
    taken = _taken(store)
    given = [addresses.parse_subnet(text, taken) for text in spec.subnets]
    if len({net.version for net in given}) != len(given):
        message = "a network has at most one IPv4 and one IPv6 subnet"
        raise ConfigError(message)
    if not any(net.version == 4 for net in given):
        # Other users choose without knowing of ours.
        own = f"{os.geteuid()} {store.path} {spec.name}"
        given.append(addresses.choose_v4(own, [net for _, net in taken]))
    if not any(net.version == 6 for net in given):
        given.append(addresses.choose_v6(f"{os.geteuid()} {store.path} {spec.name}"))
    given.sort(key=lambda net: net.version)
    leases.check(spec, given)
    return dataclasses.replace(spec, subnets=tuple(str(net) for net in given))


def create(spec: NetworkSpec) -> NetworkSpec:
    """Makes a network; nothing is put on the host before a machine joins it.

    Raises:
        ConfigError: Something isn't possible.
        ConflictError: The name or a subnet is taken.
        UnsupportedError: This user or host can't have the mode.
    """
    store = Store()
    with store.locked():
        whole = complete(spec, store)
        mode_of(whole).check(whole)
        store.add(whole)
    return whole


def remove(name: str) -> None:
    """Removes a network.

    Raises:
        NotFoundError: There is none of that name.
        ConflictError: Machines are on it.
    """
    store = Store()
    with store.locked():
        spec = store.find(name)
        _heal_one(store, spec)
        living = [member.name for member, lives in store.members(name) if lives]
        if living:
            message = f"machines are on the network {name}: {', '.join(living)}"
            raise ConflictError(message, hint=f"end them first: ringfence stop {living[0]}")
        mode_of(spec).down(spec)
        store.remove(name)


def heal() -> None:
    """Takes away what machines left whose holders died."""
    user.sweep()
    store = Store()
    if not store.names():
        return
    with store.locked():
        _heal_all(store)


def _heal_all(store: Store) -> None:
    for name in store.names():
        spec = store.get(name)
        if spec is not None:
            with suppress(RingfenceError):
                _heal_one(store, spec)


def set_policy(name: str, policy: Policy) -> None:
    """Changes the egress rules of a network, at once and for its machines to come.

    Raises:
        NotFoundError: There is none of that name.
        UnsupportedError: The mode can't hold a rule.
    """
    store = Store()
    with store.locked():
        spec = store.find(name)
        fresh = dataclasses.replace(spec, **policy.written())  # type: ignore[arg-type]
        mode = mode_of(fresh)
        mode.check(fresh)
        with ExitStack() as undo:
            undo.callback(mode.settle, spec, _living(store, name), _names(store, name))
            undo.callback(store.write, spec)
            store.write(fresh)
            mode.settle(fresh, _living(store, name), _names(store, name))
            undo.pop_all()


def set_machine_policy(machine_id: str, policy: Policy) -> list[str]:
    """Changes the egress rules of a machine on all networks that it shares with others.

    Returns:
        Those networks.

    Raises:
        UnsupportedError: A network's mode can't hold a rule.
    """
    store = Store()
    changed = []
    with store.locked():
        for name in store.names():
            spec = store.find(name)
            for member in _living(store, name):
                if member.machine_id == machine_id:
                    fresh = dataclasses.replace(member, **policy.written())  # type: ignore[arg-type]
                    with ExitStack() as undo:
                        undo.callback(_settle_as, store, spec, member)
                        _settle_as(store, spec, fresh)
                        undo.pop_all()
                    changed.append(name)
    return changed


def _settle_as(store: Store, spec: NetworkSpec, member: Member) -> None:
    store.rewrite(spec.name, member)
    mode_of(spec).settle(spec, _living(store, spec.name), _names(store, spec.name))


def _heal_one(store: Store, spec: NetworkSpec) -> None:
    dead = [member for member, lives in store.members(spec.name) if not lives]
    for member in dead:
        store.leave(spec.name, member.machine_id)
    # One that a mode's name made has a machine, unless its maker was killed before.
    if dead or (spec.implicit and not store.members(spec.name)):
        _settle(store, spec)


def _living(store: Store, network: str) -> list[Member]:
    return [member for member, lives in store.members(network) if lives]


def _names(store: Store, network: str) -> Names:
    """The names that a network answers: its machines', and those of networks that they are on too.

    A machine asks one network's server alone, so that one knows what the machine's others do.
    """
    own = _living(store, network)
    found = {member.name: list(member.addresses) for member in own if member.name}
    machines = {member.machine_id for member in own}
    for name in store.names():
        others = _living(store, name) if name != network else []
        if machines & {member.machine_id for member in others}:
            for member in others:
                if member.name:
                    found.setdefault(member.name, list(member.addresses))
    return found


def _tell_gateway(store: Store, machine_id: str) -> None:
    """Tells a machine's own gateway whom it finds on other networks: it asks that one alone."""
    found: Names = {}
    for name in store.names():
        living = _living(store, name)
        if any(member.machine_id == machine_id for member in living):
            for member in living:
                if member.name:
                    found.setdefault(member.name, list(member.addresses))
    user.tell_names(machine_id, found)


def _tell_neighbours(store: Store, network: str, living: Sequence[Member]) -> None:
    """Tells networks that share machines with one whose machines changed."""
    machines = {member.machine_id for member in living}
    for name in store.names():
        others = _living(store, name) if name != network else []
        spec = store.get(name)
        if spec is not None and machines & {member.machine_id for member in others}:
            with suppress(RingfenceError):
                mode_of(spec).settle(spec, others, _names(store, name))
    for machine_id in machines:
        _tell_gateway(store, machine_id)


def _settle(store: Store, spec: NetworkSpec) -> None:
    living = _living(store, spec.name)
    mode = mode_of(spec)
    mode.settle(spec, living, _names(store, spec.name))
    _tell_neighbours(store, spec.name, living)
    if not living:
        mode.down(spec)
        if spec.implicit:
            store.remove(spec.name)


def _implicit(store: Store, network: str) -> NetworkSpec:
    """The network that a mode's name stands for, made when missing."""
    known = store.get(network)
    if known is not None:
        return known
    mode, colon, rest = network.partition(":")
    if mode not in MODES or mode == "user":
        return store.find(network)
    if colon and mode not in ("bridge", "routed"):
        message = f"the mode {mode} takes nothing behind a colon"
        raise ConfigError(message)
    if mode == "bridge" and not rest:
        message = "the mode bridge needs the host's interface"
        raise ConfigError(message, hint="--network bridge:IF; ip link lists them")
    name = name_of(network)
    if (known := store.get(name)) is not None:
        return known
    subnets = (rest,) if mode == "routed" and rest else ()
    interface = rest if mode == "bridge" else ""
    spec = NetworkSpec(name=name, mode=mode, subnets=subnets, interface=interface, implicit=True)
    whole = complete(spec, store)
    mode_of(whole).check(whole)
    store.add(whole)
    return whole


def _member(store: Store, spec: NetworkSpec, machine_id: str, options: AttachOptions) -> Member:
    others = [member for member, _ in store.members(spec.name) if member.machine_id != machine_id]
    if any(options.name and member.name == options.name for member in others):
        message = f"a machine called {options.name} is on the network {spec.name} already"
        raise ConflictError(message, hint="give it another: --name NAME")
    mac = options.mac or addresses.derive_mac(machine_id, spec.name)
    if any(member.mac == mac for member in others):
        message = f"a machine with the Ethernet address {mac} is on the network {spec.name} already"
        raise ConflictError(message, hint="choose another, or leave it out to have one chosen")
    return Member(
        machine_id=machine_id,
        name=options.name,
        mac=mac,
        addresses=leases.choose(spec, others, options) if spec.subnets else (),
        publish=tuple(str(port) for port in options.publish),
        dns=options.dns,
        **options.policy.written(),  # type: ignore[arg-type]
    )


def attach(network: str, machine_id: str, kind: Kind, options: AttachOptions) -> Attachment:
    """Attaches a machine to a network that machines share.

    Raises:
        RingfenceError: See :func:`ringfence.network.attach`.
    """
    store = Store()
    if network.partition(":")[0] not in MODES:
        # Nothing is made for a name that doesn't exist.
        store.find(network)
    with store.locked():
        _heal_all(store)
        spec = _implicit(store, network)
        with ExitStack() as stack:
            stack.callback(_forget_unused, store, spec.name)
            member = _member(store, spec, machine_id, options)
            fd = store.join(spec.name, member)
            stack.callback(_left, store, spec.name, machine_id, fd)
            attachment = mode_of(spec).join(spec, member, kind, options, stack)
            living = _living(store, spec.name)
            mode_of(spec).settle(spec, living, _names(store, spec.name))
            _tell_neighbours(store, spec.name, living)
            attachment.own(_Leaving(stack.pop_all(), store))
    return attachment


def _forget_unused(store: Store, name: str) -> None:
    """A network that a mode's name made goes with its last machine, or with the one that failed."""
    spec = store.get(name)
    if spec is not None and spec.implicit and not store.members(name):
        with suppress(RingfenceError):
            mode_of(spec).down(spec)
        store.remove(name)


class _Leaving(ExitStack):
    """Undoes a machine's joining, while nobody else changes networks."""

    def __init__(self, stack: ExitStack, store: Store) -> None:
        super().__init__()
        self._joined: ExitStack | None = stack
        self._store = store

    def close(self) -> None:
        """Undoes it; may be called again."""
        joined, self._joined = self._joined, None
        if joined is not None:
            with self._store.locked():
                joined.close()


def _left(store: Store, network: str, machine_id: str, fd: int) -> None:
    os.close(fd)
    store.leave(network, machine_id)
    spec = store.get(network)
    if spec is not None:
        with suppress(RingfenceError):
            _settle(store, spec)
    _tell_gateway(store, machine_id)

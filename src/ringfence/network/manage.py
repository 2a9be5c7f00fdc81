"""Networks: made, listed, joined, healed and removed."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from ringfence.errors import ConfigError, ConflictError, RingfenceError
from ringfence.guest.spec import InterfaceSpec
from ringfence.network import addresses
from ringfence.network.policy import Policy
from ringfence.network.store import MODES, Member, NetworkSpec, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.network.attachment import Attachment
    from ringfence.network.options import AttachOptions, Kind

__all__ = ["attach", "create", "heal", "remove"]

_MODULES = {
    "user": "ringfence.network.shared",
    "isolated": "ringfence.network.isolated",
    "nat": "ringfence.network.nat",
    "host-only": "ringfence.network.host_only",
    "routed": "ringfence.network.routed",
    "bridge": "ringfence.network.bridge",
}


# Through memory nothing has to be split; the host's links are Ethernet.
_MTU = {"user": 65520, "isolated": 65520}


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

    def settle(self, spec: NetworkSpec, members: Sequence[Member]) -> None:
        """Tells the network which machines are on it now; takes away what others left."""

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
        spec = dataclasses.replace(spec, mtu=_MTU.get(spec.mode, 1500))
    if not 1280 <= spec.mtu <= 65520:
        message = f"the largest packet is 1280 to 65520 bytes, not {spec.mtu}"
        raise ConfigError(message)
    if (spec.mode == "bridge") != bool(spec.interface):
        message = "the mode bridge, and no other, is on an interface of the host"
        raise ConfigError(message, hint="--mode bridge --interface IF")
    Policy(allow=spec.allow, deny=spec.deny)
    if spec.mode == "bridge":
        if spec.subnets:
            message = "a network of the mode bridge has the LAN's addresses, not its own"
            raise ConfigError(message)
        return spec
    taken = _taken(store)
    given = [addresses.parse_subnet(text, taken) for text in spec.subnets]
    if len({net.version for net in given}) != len(given):
        message = "a network has at most one IPv4 and one IPv6 subnet"
        raise ConfigError(message)
    if not any(net.version == 4 for net in given):
        given.append(addresses.choose_v4(spec.name, [net for _, net in taken]))
    if not any(net.version == 6 for net in given):
        given.append(addresses.choose_v6(f"{os.geteuid()} {store.path} {spec.name}"))
    given.sort(key=lambda net: net.version)
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
    store = Store()
    if not store.names():
        return
    with store.locked():
        for name in store.names():
            spec = store.get(name)
            if spec is not None:
                with suppress(RingfenceError):
                    _heal_one(store, spec)


def _heal_one(store: Store, spec: NetworkSpec) -> None:
    dead = [member for member, lives in store.members(spec.name) if not lives]
    for member in dead:
        store.leave(spec.name, member.machine_id)
    if dead:
        _settle(store, spec)


def _settle(store: Store, spec: NetworkSpec) -> None:
    living = [member for member, lives in store.members(spec.name) if lives]
    mode = mode_of(spec)
    mode.settle(spec, living)
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
    name = f"{mode}-{rest}".replace("/", "_").replace(":", ".").rstrip("-")
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
    others = [member for member, _ in store.members(spec.name)]
    if any(options.name and member.name == options.name for member in others):
        message = f"a machine called {options.name} is on the network {spec.name} already"
        raise ConflictError(message)
    used = [address for member in others for address in member.addresses]
    nets = [ipaddress.ip_network(text) for text in spec.subnets]
    own = [addresses.free_address(net, [*used, str(net[1])], options.addresses) for net in nets]
    mac = options.mac or addresses.derive_mac(machine_id, spec.name)
    if any(member.mac == mac for member in others):
        message = f"a machine with the Ethernet address {mac} is on the network {spec.name} already"
        raise ConflictError(message)
    return Member(
        machine_id=machine_id,
        name=options.name,
        mac=mac,
        addresses=tuple(own),
        publish=tuple(str(port) for port in options.publish),
        allow=tuple(options.policy.allow),
        deny=tuple(options.policy.deny),
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
        spec = _implicit(store, network)
        _heal_one(store, spec)
        with ExitStack() as stack:
            member = _member(store, spec, machine_id, options)
            fd = store.join(spec.name, member)
            stack.callback(_left, store, spec.name, machine_id, fd)
            attachment = mode_of(spec).join(spec, member, kind, options, stack)
            living = [one for one, lives in store.members(spec.name) if lives]
            mode_of(spec).settle(spec, living)
            attachment.own(_Leaving(stack.pop_all(), store))
    return attachment


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


def interface_of(
    spec: NetworkSpec, member: Member, *, routed: bool, dns: Sequence[str] | None = None
) -> InterfaceSpec:
    """What a guest is told of its end.

    Args:
        spec: The network.
        member: The machine.
        routed: Whether there is a way outside, through the first address of each subnet.
        dns: Name servers; the first address of the IPv4 subnet when None.
    """
    nets = [ipaddress.ip_network(text) for text in spec.subnets]
    first = [str(net[1]) for net in nets]
    return InterfaceSpec(
        mac=member.mac,
        addresses=tuple(
            f"{own}/{net.prefixlen}" for own, net in zip(member.addresses, nets, strict=True)
        ),
        gateways=tuple(first) if routed else (),
        dns=tuple(first[:1] if dns is None else dns),
        mtu=spec.mtu,
    )

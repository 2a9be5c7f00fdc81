"""How a machine is attached to its networks, at its start and later."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, ConflictError, GuestError, NotFoundError
from ringfence.network import AttachOptions, LinkSpec, PublishedPort, Rate, attach
from ringfence.network.options import name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ringfence.guest.spec import InterfaceSpec
    from ringfence.machine.driver import AgentLike, Place
    from ringfence.machine.spec import MachineSpec
    from ringfence.network import Attachment
    from ringfence.network.options import Kind

__all__ = ["Attachments", "attach_options", "describe", "tell_names"]

# More of them would give a network card more than the host's threads serve.
_MOST_QUEUES = 8
# Set to 0: the VM process moves frames even where the host's kernel could.
_VHOST = "RINGFENCE_VHOST_NET"


def attach_options(spec: MachineSpec, name: str) -> AttachOptions:
    """What a machine asks of its network.

    Raises:
        ConfigError: A value can't be understood.
    """
    return AttachOptions(
        name=name,
        publish=tuple(PublishedPort.parse(text) for text in spec.ports),
        policy=spec.policy,
        dns=spec.dns,
        hosts=spec.hosts,
        hostname=spec.hostname,
        rate=Rate(send_bytes_per_s=spec.bandwidth, receive_bytes_per_s=spec.bandwidth),
        queues=min(spec.vcpus, _MOST_QUEUES),
        vhost=os.environ.get(_VHOST) != "0",
    )


def _refuse_without(spec: MachineSpec) -> None:
    """A machine without a network has nothing that belongs to one."""
    asked = {
        "publish ports": spec.ports,
        "have egress rules": spec.policy.says_something,
        "have name servers": spec.dns,
        "have a bandwidth": spec.bandwidth is not None,
    }
    for what, given in asked.items():
        if given:
            message = f"a machine without a network can't {what}"
            raise ConfigError(message, hint="add --network user")


class Attachments:
    """A machine's ends of networks, by the networks' names. A context manager: leaving detaches it.

    Args:
        spec: The machine.
        place: Its ID and name.
        kind: ``vm`` or ``container``.
    """

    def __init__(self, spec: MachineSpec, place: Place, kind: Kind) -> None:
        self._spec = spec
        self._place = place
        self._kind = kind
        self._by_name: dict[str, Attachment] = {}

    def attach_all(self) -> None:
        """Attaches the machine to what its specification says.

        Raises:
            RingfenceError: A network refuses; those before it are left by :meth:`close`.
        """
        links = self._spec.links
        if not links:
            _refuse_without(self._spec)
        for link in links:
            self.attach(link)

    def attach(self, link: LinkSpec) -> Attachment:
        """Attaches the machine to one more network.

        Raises:
            ConflictError: It is on it already.
            RingfenceError: The network refuses.
        """
        if link.network == "none":
            message = "none is no network that a machine could be on"
            raise ConfigError(message, hint="ringfence network disconnect takes it off one")
        if link.network in self._by_name:
            message = f"the machine {self._place.name} is on the network {link.network} already"
            raise ConflictError(message)
        options = attach_options(self._spec, self._place.name)
        first = not self._by_name
        options = dataclasses.replace(
            options,
            mac=link.mac,
            addresses=link.addresses,
            # Ports of the host lead to one interface.
            publish=options.publish if first else (),
            device=self._free_device(),
            leads_outside=not self._leads_outside(),
        )
        found = attach(link.network, self._place.machine_id, self._kind, options)
        self._by_name[link.network] = found
        return found

    def _leads_outside(self) -> bool:
        return any(one.interface.gateways for one in self._by_name.values())

    def _free_device(self) -> str:
        plans = [one.netns_plan for one in self._by_name.values()]
        taken = {plan.device for plan in plans if plan is not None}
        number = 0
        while f"eth{number}" in taken:
            number += 1
        return f"eth{number}"

    def take(self, network: str) -> Attachment:
        """The end on a network; it is the caller's to close.

        Raises:
            NotFoundError: The machine isn't on it.
        """
        names = [one for one in self._by_name if name_of(one) == name_of(network)]
        found = self._by_name.pop(names[0]) if names else None
        if found is None:
            message = f"the machine {self._place.name} is not on the network {network}"
            on = ", ".join(self._by_name) or "none"
            raise NotFoundError(message, hint=f"it is on: {on}")
        return found

    def give_back(self, network: str, attachment: Attachment) -> None:
        """What was taken and could not be let go of."""
        self._by_name[network] = attachment

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks, the first one first."""
        return tuple(self._by_name)

    def __iter__(self) -> Iterator[Attachment]:
        """The ends, in the order of their making."""
        return iter(list(self._by_name.values()))

    def interfaces(self) -> list[InterfaceSpec]:
        """What the guest is told; those that lead outside last.

        A server that knows nothing of outside says so, and the next one is asked; one that does
        says that there is no such name, and nobody else is.
        """
        return sorted((one.interface for one in self), key=lambda one: bool(one.gateways))

    def plugged(self, cards: Iterable[Mapping[str, object]]) -> None:
        """The VM process has these cards."""
        for card in cards:
            for one in self:
                if one.interface.mac == card["mac"]:
                    one.plugged(card)

    def count(self, devices: dict[str, dict[str, int]]) -> None:
        """Puts the host's counters in where the VM process sees no frames."""
        for one in self:
            if one.frames == "vhost-net" and one.card in devices:
                devices[one.card].update(_counted(one.link))

    def close(self) -> None:
        """Detaches the machine from all; may be called again."""
        while self._by_name:
            _, attachment = self._by_name.popitem()
            attachment.close()

    def describe(self) -> list[Mapping[str, object]]:
        """What the machine has of each network."""
        return [describe(name, one) for name, one in self._by_name.items()]


def _counted(link: str) -> dict[str, int]:
    """What passed a link, as a card's device counts it."""
    from ringfence.network.links import statistics  # noqa: PLC0415 - for links of the kernel

    words = {"sent": "tx", "received": "rx"}
    return {
        f"{words[way]}_{what}": count
        for name, count in statistics(link).items()
        for way, _, what in [name.partition("_")]
    }


def tell_names(agent: AgentLike, attachments: Attachments) -> None:
    """Tells a machine whom to ask for names, now that its networks are others."""
    servers = [address for one in attachments.interfaces() for address in one.dns]
    if servers:
        text = "".join(f"nameserver {address}\n" for address in servers)
        # A root that can't be written to keeps its own.
        with suppress(GuestError):
            agent.files.write("/etc/resolv.conf", text.encode())


def describe(network: str, attachment: Attachment) -> Mapping[str, object]:
    """What a machine has of a network."""
    interface = attachment.interface
    found = {"frames": attachment.frames} if attachment.frames else {}
    return {
        **found,
        "network": network,
        "mac": interface.mac,
        "addresses": list(interface.addresses),
        "gateways": list(interface.gateways),
        "dns": list(interface.dns),
        "published": [str(port) for port in attachment.published],
    }

"""What a machine asks of its network."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Self

from ringfence.errors import ConfigError
from ringfence.network.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AttachOptions", "Kind", "LinkSpec", "PublishedPort", "Rate", "name_of"]

Kind = Literal["vm", "container"]

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PUBLISH_HINT = "write [IP:]HOST:GUEST[/udp], such as 8080:80 or 0.0.0.0:5353:53/udp"


def name_of(network: str) -> str:
    """The name of a network that may be said as a mode: ``bridge:eth0`` is ``bridge-eth0``."""
    mode, colon, rest = network.partition(":")
    return f"{mode}-{rest}".replace("/", "_").replace(":", ".").rstrip("-") if colon else mode


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPort:
    """A port of the machine that is reached at a port of the host.

    Args:
        host: The host's port; 0 takes any that is free.
        guest: The machine's port.
        address: The host's address; its loopback unless said otherwise.
        transport: ``tcp`` or ``udp``.
    """

    host: int
    guest: int
    address: str = "127.0.0.1"
    transport: Literal["tcp", "udp"] = "tcp"

    @classmethod
    def parse(cls, text: str) -> Self:
        """A port as the command line writes it: ``[IP:]HOST:GUEST[/udp]``.

        Raises:
            ConfigError: It isn't of that form.
        """
        rest, _, transport = text.partition("/")
        front, _, guest = rest.rpartition(":")
        address, _, host = front.rpartition(":")
        address = address.removeprefix("[").removesuffix("]") or "127.0.0.1"
        if transport not in ("", "tcp", "udp") or not (host.isdigit() and guest.isdigit()):
            message = f"{text!r} is not a port to publish"
            raise ConfigError(message, hint=_PUBLISH_HINT)
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            message = f"{address!r} in {text!r} is not an address of this host"
            raise ConfigError(message, hint=_PUBLISH_HINT) from error
        if not (0 <= int(host) <= 65535 and 1 <= int(guest) <= 65535):
            message = f"{text!r} names a port outside of 1 to 65535"
            raise ConfigError(message, hint=_PUBLISH_HINT)
        return cls(
            host=int(host),
            guest=int(guest),
            address=address,
            transport="udp" if transport == "udp" else "tcp",
        )

    def __str__(self) -> str:
        """As it is written."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.host}:{self.guest}/{self.transport}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One of a machine's interfaces: the network that it is on, and who it is there.

    Args:
        network: A mode, or the name of a network.
        mac: Its Ethernet address; made from the machine's ID when empty.
        addresses: Addresses that it wants; with a prefix (``10.0.0.5/24``) on a LAN.
    """

    network: str
    mac: str = ""
    addresses: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """As it is written: ``NETWORK[,ip=ADDRESS][,mac=MAC]``.

        Raises:
            ConfigError: It isn't of that form.
        """
        network, *rest = text.split(",")
        mac, addresses = "", []
        for word in rest:
            key, _, value = word.partition("=")
            if key == "ip" and value:
                addresses.append(value)
            elif key == "mac" and value:
                mac = value.lower()
            else:
                message = f"{word!r} in {text!r} says nothing of an interface"
                raise ConfigError(message, hint="write NETWORK[,ip=ADDRESS][,mac=MAC]")
        if not network:
            message = f"{text!r} names no network"
            raise ConfigError(message, hint="write NETWORK[,ip=ADDRESS][,mac=MAC]")
        return cls(network=network, mac=mac, addresses=tuple(addresses))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast a machine may send and receive; None is as fast as it goes.

    Args:
        send_bytes_per_s: What it sends.
        receive_bytes_per_s: What it receives.
    """

    send_bytes_per_s: int | None = None
    receive_bytes_per_s: int | None = None

    def document(self) -> dict[str, object]:
        """As the gateway reads it."""
        return {
            "send_bytes_per_s": self.send_bytes_per_s,
            "receive_bytes_per_s": self.receive_bytes_per_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachOptions:
    """What a machine asks of its network.

    Args:
        name: The machine's name, by which others of the network find it.
        publish: Ports of it that are reached at ports of the host.
        policy: Who it may reach; the network's own rules hold besides.
        dns: Name servers to ask instead of the host's.
        hosts: Names to addresses, answered by the network.
        hostname: The machine's name for itself.
        mac: Its Ethernet address; made from its ID when empty.
        addresses: Addresses that it wants of the network's; any free ones when empty. On a LAN
            each has its prefix.
        rate: How fast it may be.
        device: A container's name for the interface.
        queues: Pairs of queues that a VM's card may have.
        vhost: The host's kernel may move a VM's frames by itself, where it has vhost-net.
        leads_outside: The interface's gateways are the machine's; one interface's should be.

    Raises:
        ConfigError: A value is outside of what is possible.
    """

    name: str = ""
    publish: tuple[PublishedPort, ...] = ()
    policy: Policy = field(default_factory=Policy)
    dns: tuple[str, ...] = ()
    hosts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    hostname: str = ""
    mac: str = ""
    addresses: tuple[str, ...] = ()
    rate: Rate = field(default_factory=Rate)
    device: str = "eth0"
    queues: int = 1
    vhost: bool = False
    leads_outside: bool = True

    def __post_init__(self) -> None:
        """Checks what can be checked without the network."""
        for text in (*self.dns, *self.hosts.values(), *self.addresses):
            try:
                ipaddress.ip_interface(text) if text in self.addresses else ipaddress.ip_address(
                    text
                )
            except ValueError as error:
                message = f"{text!r} is not an IP address"
                raise ConfigError(message) from error
        if self.mac and (not _MAC.fullmatch(self.mac) or int(self.mac[:2], 16) & 1):
            message = f"{self.mac!r} is not the Ethernet address of one machine"
            raise ConfigError(message, hint="such as 02:00:00:00:00:01; the first number is even")

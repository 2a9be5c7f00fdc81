"""What the modes of the host's kernel have in common: a bridge, rules, addresses and names."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, HostError, UnsupportedError
from ringfence.network import dnsmasq, firewall, gateway, links, manage, tap
from ringfence.network.attachment import Attachment, NetnsPlan
from ringfence.network.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from ringfence.guest.spec import InterfaceSpec
    from ringfence.network.firewall import Passage
    from ringfence.network.options import AttachOptions, Kind, PublishedPort
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["KernelMode", "bridge_of", "describe", "table_of"]

_DEVICE = "eth0"
_SYSCTL = Path("/proc/sys/net")


def _identity(spec: NetworkSpec) -> tuple[str, ...]:
    # Two users, or two homes of one, may have networks of the same name.
    return (str(os.geteuid()), str(Store().path), spec.name)


def bridge_of(spec: NetworkSpec) -> str:
    """The host's bridge of a network."""
    return spec.interface or links.link_name("rfb", *_identity(spec))


def table_of(spec: NetworkSpec) -> str:
    """The name of a network's tables of rules."""
    return links.link_name("ringfence_", *_identity(spec))


def describe(spec: NetworkSpec) -> dict[str, object]:
    """What a network is on the host: its bridge, its table, and what was refused."""
    found: dict[str, object] = {"bridge": bridge_of(spec), "table": table_of(spec)}
    with suppress(HostError):
        found["refused"] = firewall.counters(table_of(spec))
    return found


def _set(path: Path, value: str) -> None:
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        message = f"cannot set {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(path)) from error


def _forward_packets() -> None:
    """Lets the host forward, without losing routes that it learned from routers."""
    _set(_SYSCTL / "ipv4" / "ip_forward", "1")
    six = _SYSCTL / "ipv6" / "conf"
    if not six.is_dir() or (six / "all" / "forwarding").read_text().strip() == "1":
        return
    for folder in six.iterdir():
        # A host that forwards takes advertisements only when it is told twice (ip-sysctl.rst).
        with suppress(OSError):
            if (folder / "accept_ra").read_text().strip() == "1":
                (folder / "accept_ra").write_text("2")
    _set(six / "all" / "forwarding", "1")


class KernelMode:
    """A mode whose network is a bridge of the host.

    Args:
        name: The mode's name.
        passage: What passes through the host.
    """

    def __init__(self, name: str, passage: Passage) -> None:
        self._name = name
        self._passage = passage

    def check(self, spec: NetworkSpec) -> None:
        """See :class:`ringfence.network.manage.Mode`.

        Raises:
            UnsupportedError: It takes root, a program is missing, or a rule can't be held.
        """
        links.require_rights(self._name)
        dnsmasq.program()
        list(firewall.egress_rules(spec, []))

    def _first(self, spec: NetworkSpec) -> list[str]:
        return [str(ipaddress.ip_network(text)[1]) for text in spec.subnets]

    def join(
        self,
        spec: NetworkSpec,
        member: Member,
        kind: Kind,
        options: AttachOptions,
        stack: ExitStack,
    ) -> Attachment:
        """See :class:`ringfence.network.manage.Mode`."""
        self.check(spec)
        if options.dns or options.hosts:
            message = f"a network of the mode {self._name} has its own name server"
            raise ConfigError(message, hint="write what differs into the guest's /etc/hosts")
        bridge = bridge_of(spec)
        nets = [ipaddress.ip_network(text) for text in spec.subnets]
        own = [f"{net[1]}/{net.prefixlen}" for net in nets]
        links.ensure_bridge(bridge, own, spec.mtu)
        _set(_SYSCTL / "ipv4" / "conf" / bridge / "route_localnet", "1")
        if self._passage.outside or self._passage.inside:
            _forward_packets()
        interface = manage.interface_of(spec, member, routed=self._passage.outside)
        published = _reserve(options, stack)
        return plug(spec, member, kind, interface, (options, published), stack)

    def settle(self, spec: NetworkSpec, members: Sequence[Member]) -> None:
        """Writes the rules and the names for those who are there."""
        if not members:
            return
        bridge = bridge_of(spec)
        firewall.apply(table_of(spec), bridge, spec, self._passage, members)
        folder = Store().folder(spec.name)
        first = self._first(spec)
        routed = self._passage.outside
        dnsmasq.apply(folder, bridge, spec, first, members, routed=routed)

    def down(self, spec: NetworkSpec) -> None:
        """Takes the bridge, the rules and the name server away."""
        dnsmasq.stop(Store().folder(spec.name))
        firewall.delete(table_of(spec))
        links.remove(bridge_of(spec))


def _reserve(options: AttachOptions, stack: ExitStack) -> list[PublishedPort]:
    """Takes the host's ports, so that nobody else believes them free."""
    found = []
    for port in options.publish:
        bound = stack.enter_context(gateway.bind_published(port, listen=False))
        found.append(dataclasses.replace(port, host=int(bound.getsockname()[1])))
    return found


def plug(
    spec: NetworkSpec,
    member: Member,
    kind: Kind,
    interface: InterfaceSpec,
    asked: tuple[AttachOptions, list[PublishedPort]],
    stack: ExitStack,
) -> Attachment:
    """Puts a machine's link on the network's bridge."""
    options, published = asked
    link = links.link_name("rft", *_identity(spec), member.machine_id)
    whole = dataclasses.replace(member, link=link, publish=tuple(str(port) for port in published))
    Store().rewrite(spec.name, whole)
    limit = options.rate.send_bytes_per_s
    if kind == "container" and limit is not None:
        message = f"a container's bandwidth isn't bounded in the mode {spec.mode}"
        raise UnsupportedError(message, hint="use --network user or isolated")
    if kind == "container":
        stack.callback(links.remove, link)
        return _VethAttachment(spec, link, interface, options, published)
    tun = links.add_tap(link, bridge_of(spec), spec.mtu)
    stack.callback(os.close, tun)
    device = {"type": "net", "tap_fds": [tun], "mac": member.mac, "lock_mac": True}
    if limit is not None:
        device["rate"] = {"bytes_per_s": limit}
    if spec.mtu != 1500:
        device["mtu"] = spec.mtu
    return Attachment(interface=interface, device=device, fds=[tun], hosts={}, published=published)


class _VethAttachment(Attachment):
    """A container's end: a veth pair, made when its namespace is there."""

    def __init__(
        self,
        spec: NetworkSpec,
        link: str,
        interface: InterfaceSpec,
        options: AttachOptions,
        published: list[PublishedPort],
    ) -> None:
        super().__init__(interface=interface, device={}, hosts=options.hosts, published=published)
        self._plan = NetnsPlan(device=_DEVICE, how="veth")
        self._spec = spec
        self._link = link

    def enter(self, pid: int) -> None:
        """Makes the pair, and sets its end in the namespace up.

        Raises:
            HostError: The host refuses.
        """
        spec = self._spec
        links.add_veth(self._link, _DEVICE, bridge_of(spec), spec.mtu, pid)
        tap.set_up(pid, _DEVICE, self.interface)

"""What the modes of the host's kernel have in common: a bridge, rules, addresses and names."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, HostError
from ringfence.network import dnsmasq, firewall, gateway, lan, links, names, relay, tables, tap
from ringfence.network.attachment import Attachment, NetnsPlan
from ringfence.network.interfaces import interface_of
from ringfence.network.options import Rate
from ringfence.network.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import ExitStack

    from ringfence.guest.spec import InterfaceSpec
    from ringfence.network.firewall import Passage
    from ringfence.network.options import AttachOptions, Kind, PublishedPort
    from ringfence.network.policy import Policy
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["KernelMode", "bridge_of", "describe", "refusals", "routes_to", "table_of"]

_LOG = logging.getLogger(__name__)
_SYSCTL = Path("/proc/sys/net")


def _identity(spec: NetworkSpec) -> tuple[str, ...]:
    # Two users, or two homes of one, may have networks of the same name.
    return (str(os.geteuid()), str(Store().path), spec.name)


def bridge_of(spec: NetworkSpec) -> str:
    """The host's bridge of a network."""
    known = lan.master_of(spec.interface) if spec.interface else None
    return known or links.link_name("rfb", *_identity(spec))


def table_of(spec: NetworkSpec) -> str:
    """The name of a network's tables of rules."""
    return links.link_name("ringfence_", *_identity(spec), size=26)


def describe(spec: NetworkSpec) -> dict[str, object]:
    """What a network is on the host: its bridge, its table, and what was refused."""
    found: dict[str, object] = {"bridge": bridge_of(spec), "table": table_of(spec)}
    with suppress(HostError):
        found["refused"] = firewall.counters(table_of(spec))
    if spec.mode == "routed":
        found["routes"] = routes_to(spec)
    return found


def refusals(spec: NetworkSpec) -> dict[str, object]:
    """What was refused: counts by reason, and the last hour's, with the machines' names."""
    members = [member for member, _ in Store().members(spec.name)]
    owner = {ip: one.name or one.machine_id for one in members for ip in one.addresses}
    recent = firewall.refusals(table_of(spec)) + names.refusals(Store().folder(spec.name))
    relayed, passed_on = relay.refusals(spec)
    for one in recent:
        one.setdefault("port", owner.get(str(one["address"]), one["address"]))
    recent += passed_on
    recent.sort(key=lambda one: float(str(one["time"])))
    counts: dict[str, int] = {}
    with suppress(HostError):
        counts = {name: n for name, n in firewall.counters(table_of(spec)).items() if n}
    for reason, count in relayed.items():
        name = reason.replace("-", "_")
        counts[name] = counts.get(name, 0) + count
    return {"counts": counts, "recent": recent}


def routes_to(spec: NetworkSpec) -> list[str]:
    """The commands by which other hosts learn the way to a network."""
    found = []
    for text in spec.subnets:
        own = links.own_address(ipaddress.ip_network(text).version) or "THIS-HOST"
        found.append(f"ip {'-6 ' if ':' in text else ''}route add {text} via {own}")
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


def _rules_names(policies: Iterable[Policy]) -> bool:
    """Whether names are told by a server of our own."""
    # What can't be reached needs no address, and a name server is a way out for data.
    return any(one.about_names or one.refuses_by_default for one in policies)


class KernelMode:
    """A mode whose network is a bridge of the host.

    Args:
        name: The mode's name.
        passage: What passes through the host.
    """

    def __init__(self, name: str, passage: Passage) -> None:
        self._name = name
        self._passage = passage

    def check(self, spec: NetworkSpec) -> None:  # noqa: ARG002 - other modes look at it
        """See :class:`ringfence.network.manage.Mode`.

        Raises:
            UnsupportedError: It takes root, or a program is missing.
        """
        links.require_rights(self._name)
        dnsmasq.program()

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
        bridge = bridge_of(spec)
        nets = [ipaddress.ip_network(text) for text in spec.subnets]
        own = [f"{net[1]}/{net.prefixlen}" for net in nets]
        fresh = links.mtu_of(bridge) is None
        links.ensure_bridge(bridge, own, spec.mtu)
        if fresh:
            self._warn_of_others(spec, bridge)
        _set(_SYSCTL / "ipv4" / "conf" / bridge / "route_localnet", "1")
        if self._passage.outside or self._passage.inside:
            _forward_packets()
        # Where rules are about names, only what our own server answered is open.
        dns = () if _rules_names((spec.policy, options.policy)) else options.dns
        interface = interface_of(spec, member, routed=self._passage.outside, dns=dns)
        published = _reserve(options, stack)
        return plug(spec, member, kind, interface, (options, published), stack)

    def _warn_of_others(self, spec: NetworkSpec, bridge: str) -> None:
        """Says when the host's own firewall drops what machines need: a table admits for itself."""
        for hook, what in (("forward", "reach outside"), ("input", "get addresses and names")):
            if hook == "input" or self._passage.outside or self._passage.inside:
                for chain in tables.refusing(hook, bridge):
                    _LOG.warning(
                        "machines of %s may not %s: the chain %s of this host's firewall drops"
                        " it. To admit it: nft insert rule %s iifname %s accept",
                        spec.name, what, chain, chain, bridge,
                    )  # fmt: skip
                    if hook == "forward":
                        _LOG.warning("and: nft insert rule %s oifname %s accept", chain, bridge)

    def settle(
        self, spec: NetworkSpec, members: Sequence[Member], known: Mapping[str, list[str]]
    ) -> None:
        """Writes the rules and the names for those who are there."""
        if not members:
            return
        bridge = bridge_of(spec)
        folder = Store().folder(spec.name)
        first = self._first(spec)
        policies = (spec.policy, *(member.policy for member in members))
        looked_at = self._passage.outside and any(one.about_names for one in policies)
        relayed_by = relay.apply(spec, members, first) if looked_at else []
        firewall.apply(table_of(spec), bridge, spec, self._passage, members, relayed_by)
        ruled = _rules_names(policies)
        serving = dnsmasq.Serving(
            folder=folder,
            bridge=bridge,
            first=first,
            routed=self._passage.outside,
            names=not ruled,
            known=known,
        )
        if not ruled:
            names.stop(folder)
        dnsmasq.apply(serving, spec, members)
        if ruled:
            names.apply(serving, table_of(spec), spec, members)

    def down(self, spec: NetworkSpec) -> None:
        """Takes the bridge, the rules and the name server away."""
        relay.stop(spec)
        names.stop(Store().folder(spec.name))
        dnsmasq.stop(Store().folder(spec.name))
        firewall.delete(table_of(spec))
        links.remove(bridge_of(spec))


def _reserve(options: AttachOptions, stack: ExitStack) -> list[PublishedPort]:
    """Takes the host's ports, so that nobody else believes them free.

    Raises:
        ConfigError: The kernel can't publish there.
        ConflictError: A port is in use.
    """
    found = []
    for port in options.publish:
        if port.address == "::1":
            message = f"the host's kernel passes nothing on that comes by ::1, so not {port} either"
            raise ConfigError(message, hint="publish it on 127.0.0.1, or use --network user")
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
    rate = options.rate if kind == "container" else Rate()
    whole = dataclasses.replace(
        member,
        link=link,
        publish=tuple(str(port) for port in published),
        send_bytes_per_s=rate.send_bytes_per_s,
        receive_bytes_per_s=rate.receive_bytes_per_s,
    )
    Store().rewrite(spec.name, whole)
    if kind == "container":
        stack.callback(links.remove, link)
        return _VethAttachment(spec, link, interface, options, published)
    device, fds = _card(spec, whole, options)
    for fd in fds:
        stack.callback(os.close, fd)
    found = _TapAttachment(
        interface=interface, device=device, fds=fds, hosts=options.hosts, published=published
    )
    found.link = link
    found.told = partial(Store().note_frames, spec.name, member.machine_id)
    return found


def _card(
    spec: NetworkSpec, member: Member, options: AttachOptions
) -> tuple[dict[str, object], list[int]]:
    """A VM's card, and its descriptors."""
    tuns = links.add_tap(member.link, bridge_of(spec), spec.mtu, options.queues)
    device: dict[str, object] = {
        "type": "net", "tap_fds": tuns, "mac": member.mac, "lock_mac": True
    }  # fmt: skip
    if spec.mtu != 1500:
        device["mtu"] = spec.mtu
    if options.rate.send_bytes_per_s is not None:
        # The VM process holds back what is too much; rules of the kernel would drop it.
        device["rate"] = {"bytes_per_s": options.rate.send_bytes_per_s}
        return device, tuns
    # The host's rules hold the machine to its addresses, whoever moves its frames.
    vhost = links.open_vhost(len(tuns)) if options.vhost else []
    if vhost:
        device["vhost_fds"] = vhost
    return device, tuns + vhost


class _TapAttachment(Attachment):
    """A VM's end: a TAP device."""

    told: Callable[[str], None]

    def plugged(self, card: Mapping[str, object]) -> None:
        """The VM has the card: who moves its frames is written down."""
        super().plugged(card)
        self.told(self.frames)


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
        self._plan = NetnsPlan(device=options.device, how="veth")
        self._spec = spec
        self._link = link

    def enter(self, pid: int) -> None:
        """Makes the pair, and sets its end in the namespace up.

        Raises:
            HostError: The host refuses.
        """
        spec = self._spec
        device = self._plan.device if self._plan else ""
        links.add_veth(self._link, device, bridge_of(spec), spec.mtu, pid)
        tap.set_up(pid, device, self.interface)

"""Mode ``user``: outside through a gateway in user space, one of its own for each machine. No root."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from ringfence import _paths
from ringfence.errors import ConfigError, StateError
from ringfence.guest.spec import InterfaceSpec
from ringfence.network import addresses, dnsmasq, gateway, tap
from ringfence.network.attachment import Attachment, NetnsPlan
from ringfence.network.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ringfence.network.gateway import Gateway
    from ringfence.network.options import AttachOptions, Kind, PublishedPort

__all__ = ["attach", "control_path", "join", "log_path", "sweep", "tell_names"]

# The largest packet: no segment has to be split, whatever it is of.
MTU = 65520
_FAVOURITES = ("10.0.2.0/24", "10.0.3.0/24", "192.168.127.0/24")
_V6 = "fd52:1f:2::/64"
_GATEWAY_MAC = "52:00:00:00:00:02"
_GATEWAY_HOST, _GUEST_HOST = 2, 15


def control_path(name: str) -> Path:
    """Where the gateway of a machine (by its ID) or of a network is steered."""
    return _paths.runtime_dir() / "net" / f"{name}.sock"


def _subnets() -> tuple[ipaddress.IPv4Network, ipaddress.IPv6Network]:
    """Subnets that hide nothing which the host reaches."""
    used = addresses.host_networks()
    for text in _FAVOURITES:
        candidate = ipaddress.IPv4Network(text)
        if not any(candidate.overlaps(other) for other in used):
            return candidate, ipaddress.IPv6Network(_V6)
    return addresses.choose_v4("user", []), ipaddress.IPv6Network(_V6)


def attach(machine_id: str, kind: Kind, options: AttachOptions) -> Attachment:
    """Attaches a machine to a gateway of its own.

    Raises:
        ConflictError: A published port is in use.
        HostError: The gateway can't be started.
    """
    sweep()
    v4, v6 = _subnets()
    mac = options.mac or addresses.derive_mac(machine_id, "user")
    own = [str(v4[_GUEST_HOST]), str(v6[_GUEST_HOST])]
    if options.addresses:
        message = "in the mode user a machine has a network of its own, and its address is given"
        raise ConfigError(message, hint="leave the address out, or make a network")
    document: dict[str, object] = {
        "version": 1,
        "name": options.name or machine_id,
        "mac": _GATEWAY_MAC,
        "ipv4": f"{v4[_GATEWAY_HOST]}/{v4.prefixlen}",
        "ipv6": f"{v6[_GATEWAY_HOST]}/{v6.prefixlen}",
        "mtu": MTU,
        "nameservers": list(options.dns) or addresses.host_nameservers(),
        "names": _names(options, own, [str(v4[_GATEWAY_HOST]), str(v6[_GATEWAY_HOST])]),
        "policy": options.policy.document(),
    }
    port: dict[str, object] = {
        "name": machine_id,
        "mac": mac,
        "addresses": own,
        "hostname": options.hostname,
        "rate": options.rate.document(),
    }
    interface = InterfaceSpec(
        mac=mac,
        addresses=(f"{own[0]}/{v4.prefixlen}", f"{own[1]}/{v6.prefixlen}"),
        gateways=(str(v4[_GATEWAY_HOST]), str(v6[_GATEWAY_HOST])),
        dns=(str(v4[_GATEWAY_HOST]),),
        mtu=MTU,
    )
    with ExitStack() as stack:
        path = control_path(machine_id)
        running = gateway.spawn(
            document, [], control_path=path, log=log_path(machine_id), owned=True
        )
        stack.callback(_end, running, path)
        attachment = join(running, port, kind, interface, options, stack)
        attachment.own(stack.pop_all())
    return attachment


def log_path(name: str) -> Path:
    """Where the gateway of a machine (by its ID) or of a network writes its log."""
    folder = _paths.state_dir() / "networks" / "log"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"{name}.log"


def sweep() -> None:
    """Takes away what is left of machines' gateways whose makers were killed.

    A network's own is its network's affair.
    """
    networks = Store().names()
    folder = control_path("x").parent
    for path in (*folder.glob("*.sock"), *folder.glob("*.new")):
        if path.stem not in networks and not gateway.listens(path):
            _forget(path)


def _forget(path: Path) -> None:
    # By the socket it is known that there is something left.
    for one in (log_path(path.stem), path):
        with suppress(OSError):
            one.unlink(missing_ok=True)


def _end(running: Gateway, path: Path) -> None:
    running.close()
    _forget(path)


def _names(options: AttachOptions, own: list[str], gateways: list[str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {dnsmasq.HOST_NAME: gateways}
    if options.name:
        names[options.name] = own
    for name, address in options.hosts.items():
        names.setdefault(name, []).append(address)
    return names


def join(
    running: Gateway,
    port: dict[str, object],
    kind: Kind,
    interface: InterfaceSpec,
    options: AttachOptions,
    stack: ExitStack,
) -> Attachment:
    """Gives a machine a link to a running gateway.

    Args:
        running: The gateway.
        port: The link, but for its descriptor.
        kind: Of the machine.
        interface: What the guest is told.
        options: What the machine asks.
        stack: Undone by the caller when this fails, and by the attachment's end.
    """
    name = str(port["name"])
    if kind == "container":
        return _TapAttachment(running, port, interface, options)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(ours.close)
    with theirs:
        running.call("add_port", {**port, "fd": 0, "link": "socket"}, [theirs.fileno()])
    published = publish(running, name, options)
    device = {
        "type": "net",
        "link_fd": ours.fileno(),
        "mac": interface.mac,
        "lock_mac": True,
        "mtu": interface.mtu,
    }
    return Attachment(
        interface=interface,
        device=device,
        fds=[ours.fileno()],
        hosts=options.hosts,
        published=published,
    )


def tell_names(machine_id: str, names: Mapping[str, list[str]]) -> None:
    """Tells a machine's own gateway, if it has one, the names of other networks that it is on."""
    path = control_path(machine_id)
    if path.exists():
        with suppress(StateError), gateway.connect(path) as running:
            running.call("set_shared_names", dict(names))


def publish(running: Gateway, name: str, options: AttachOptions) -> list[PublishedPort]:
    """Publishes what was asked for; returns it with the ports that were bound.

    Raises:
        ConflictError: A port is in use.
    """
    found = []
    for port in options.publish:
        with gateway.bind_published(port) as bound:
            fields = {"fd": 0, "port": name, "to": port.guest}
            running.call("publish", fields, [bound.fileno()])
            found.append(dataclasses.replace(port, host=int(bound.getsockname()[1])))
    return found


class _TapAttachment(Attachment):
    """A container's end: its TAP device is made when its namespace is there."""

    def __init__(
        self,
        running: Gateway,
        port: dict[str, object],
        interface: InterfaceSpec,
        options: AttachOptions,
    ) -> None:
        super().__init__(interface=interface, device={}, hosts=options.hosts)
        self._plan = NetnsPlan(device=options.device, how="tap")
        self._running = running
        self._port = port
        self._options = options

    def enter(self, pid: int) -> None:
        """Makes and sets up the TAP device in the namespaces of a process, and links it.

        Raises:
            HostError: The host refuses.
        """
        with tap.in_namespace(pid, self._options.device, self.interface) as device:
            self._running.call(
                "add_port", {**self._port, "fd": 0, "link": "tap"}, [device.fileno()]
            )
        self.published = tuple(publish(self._running, str(self._port["name"]), self._options))

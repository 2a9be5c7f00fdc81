"""Links of the host's kernel: bridges, TAP devices, veth pairs. All need root.

Source: Linux ``rtnetlink(7)``, ``Documentation/networking/{bridge,tuntap}.rst``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import os
import socket
import struct
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ringfence.errors import HostError, NotFoundError, UnsupportedError
from ringfence.network.addresses import check_free, derive_mac

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "add_tap",
    "add_veth",
    "ensure_bridge",
    "has_rights",
    "is_bridge",
    "link_name",
    "mtu_of",
    "open_vhost",
    "own_address",
    "port_mac",
    "remove",
    "require_rights",
    "statistics",
]

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_CAP_NET_ADMIN = 12
# 01:80:c2:00:00:00 to 0f, but 01: those are pauses, which no bridge passes on.
_GROUPS = 0xFFFD


class _Route(Protocol):
    """What is used of pyroute2's IPRoute."""

    def link(self, command: str, **fields: object) -> object: ...
    def addr(self, command: str, **fields: object) -> object: ...
    def link_lookup(self, **fields: object) -> Sequence[int]: ...
    def close(self) -> None: ...


@contextmanager
def _route(action: str) -> Iterator[_Route]:
    """A connection to the kernel's links; its errors become ours.

    Raises:
        HostError: The kernel refuses.
    """
    from pyroute2 import IPRoute  # type: ignore[import-untyped]  # noqa: PLC0415 - slow to import
    from pyroute2.netlink.exceptions import (  # type: ignore[import-untyped]  # noqa: PLC0415
        NetlinkError,
    )

    route = cast("_Route", IPRoute())
    try:
        yield route
    except NetlinkError as error:
        message = f"cannot {action}: {os.strerror(error.code)}"
        hint = "modprobe bridge veth tun" if error.code == errno.EOPNOTSUPP else ""
        raise HostError(message, hint=hint, errno=error.code) from error
    finally:
        route.close()


def has_rights() -> bool:
    """Whether this process may change the host's links."""
    with suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        effective = int(status.partition("CapEff:")[2].split()[0], 16)
        return bool(effective >> _CAP_NET_ADMIN & 1)
    return os.geteuid() == 0


def require_rights(mode: str) -> None:
    """Checks that this process may change the host's links.

    Raises:
        UnsupportedError: It may not.
    """
    if not has_rights():
        message = f"the mode {mode} changes the host's links, which needs root (CAP_NET_ADMIN)"
        hint = "use --network user or isolated, which need nothing, or run it with sudo"
        raise UnsupportedError(message, hint=hint)


def link_name(prefix: str, *parts: str, size: int = 15) -> str:
    """A name made from words, the same for the same ones; a link's has at most 15 bytes."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return prefix + digest[: size - len(prefix)]


def _index(route: _Route, name: str) -> int | None:
    found = route.link_lookup(ifname=name)
    return found[0] if found else None


def ensure_bridge(name: str, addresses: Sequence[str], mtu: int) -> None:
    """A bridge with addresses, up; made when missing.

    Args:
        name: Its name.
        addresses: With prefix.
        mtu: The largest packet.

    Raises:
        HostError: The kernel refuses.
        ConflictError: The host has got a route to a part of it meanwhile.
    """
    with _route(f"make the bridge {name}") as route:
        if _index(route, name) is not None:
            return
        for text in addresses:
            check_free(ipaddress.ip_interface(text).network)
        # Left to itself a bridge takes its ports' addresses as they come and go, and machines
        # that know it by another speak to nobody.
        own = derive_mac(name, "bridge")
        route.link("add", ifname=name, kind="bridge", mtu=mtu, address=own)
        index = _index(route, name)
        try:
            # No waiting until a port forwards: there are no loops.
            Path(f"/sys/class/net/{name}/bridge/forward_delay").write_text("0")
            Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")
        except OSError as error:
            message = f"cannot set up the bridge {name}: {error.strerror}"
            raise HostError(message, errno=error.errno, path=error.filename) from error
        for text in addresses:
            one = ipaddress.ip_interface(text)
            route.addr("add", index=index, address=str(one.ip), prefixlen=one.network.prefixlen)
        route.link("set", index=index, state="up")


def port_mac(name: str) -> str:
    """The Ethernet address that the host's end of a machine's link has.

    A bridge has the lowest one of its ports, unless it was given one: the host's own bridge must
    not get another, and with it the host, because machines come and go.
    """
    return f"fe{derive_mac(name, 'port')[2:]}"


def mtu_of(name: str) -> int | None:
    """The largest packet of a link, if there is such a link."""
    with suppress(OSError, ValueError):
        return int((Path("/sys/class/net") / name / "mtu").read_text())
    return None


def is_bridge(name: str) -> bool:
    """Whether the host's interface is a bridge.

    Raises:
        NotFoundError: There is no such interface.
    """
    path = Path("/sys/class/net") / name
    if "/" in name or not path.exists():
        message = f"this host has no interface {name!r}"
        raise NotFoundError(message, hint="ip link lists them")
    return (path / "bridge").is_dir()


def add_tap(
    name: str, bridge: str, mtu: int, queues: int = 1, *, headers: bool = True
) -> list[int]:
    """A TAP device on a bridge, up; it goes when its descriptors are closed, one for each queue.

    Args:
        name: Its name.
        bridge: The bridge.
        mtu: The largest packet.
        queues: How many queues.
        headers: Frames have a virtio header.

    Raises:
        HostError: The kernel refuses.
    """
    tuns: list[int] = []
    try:
        flags = _IFF_TAP | _IFF_NO_PI | (_IFF_MULTI_QUEUE if queues > 1 else 0)
        flags |= _IFF_VNET_HDR if headers else 0
        for _ in range(queues):
            tuns.append(_open_tun())
            fcntl.ioctl(tuns[-1], _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        _enslave(name, bridge, mtu)
    except OSError as error:
        for tun in tuns:
            os.close(tun)
        if isinstance(error, HostError):
            raise
        message = f"cannot make the TAP device {name}: {error.strerror}"
        raise HostError(message, errno=error.errno) from error
    return tuns


def _open_tun() -> int:
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        message = f"cannot open /dev/net/tun: {error.strerror}"
        raise HostError(message, hint="modprobe tun", errno=error.errno) from error


def open_vhost(count: int) -> list[int]:
    """Instances of vhost-net; none where the host has it not, or not for this user."""
    found: list[int] = []
    try:
        for _ in range(count):
            found.append(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))  # noqa: PERF401
    except OSError:
        for one in found:
            os.close(one)
        return []
    return found


def _enslave(name: str, bridge: str, mtu: int) -> None:
    with _route(f"put {name} on the bridge {bridge}") as route:
        master = _index(route, bridge)
        index = _index(route, name)
        route.link("set", index=index, address=port_mac(name))
        # The host has no address there: it has the bridge's.
        with suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        route.link("set", index=index, mtu=mtu, master=master)
        # Frames to the groups that bridges keep to themselves would reach the host past the rules,
        # as if they came to this link: they are to meet the rules as all others do.
        with suppress(OSError):
            Path(f"/sys/class/net/{name}/brport/group_fwd_mask").write_text(str(_GROUPS))
        route.link("set", index=index, state="up")


def add_veth(name: str, peer: str, bridge: str, mtu: int, pid: int) -> None:
    """A veth pair: one end on a bridge, the other in the network namespace of a process.

    Raises:
        HostError: The kernel refuses.
    """
    remove(name)
    with _route(f"make the link {name}") as route:
        ends: dict[str, object] = {"ifname": peer, "mtu": mtu, "net_ns_fd": f"/proc/{pid}/ns/net"}
        route.link("add", ifname=name, kind="veth", mtu=mtu, peer=ends)
    _enslave(name, bridge, mtu)


def own_address(version: int) -> str | None:
    """This host's address towards outside, as its routes choose it."""
    family, far = (
        (socket.AF_INET, "192.0.2.1") if version == 4 else (socket.AF_INET6, "2001:db8::1")
    )
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting a datagram socket asks for a route alone.
        probe.connect((far, 9))
        return str(probe.getsockname()[0])
    return None


def statistics(name: str) -> dict[str, int]:
    """What passed a machine's link, from the machine's point of view; nothing when it is gone."""
    folder = Path("/sys/class/net") / name / "statistics"
    found = {}
    for ours, theirs in (("sent", "rx"), ("received", "tx")):
        for kernel, word in (("bytes", "bytes"), ("packets", "frames"), ("dropped", "dropped")):
            with suppress(OSError, ValueError):
                found[f"{ours}_{word}"] = int((folder / f"{theirs}_{kernel}").read_text())
    return found


def remove(name: str) -> None:
    """Removes a link, if it is there.

    Raises:
        HostError: The kernel refuses.
    """
    try:
        with _route(f"remove the link {name}") as route:
            index = _index(route, name)
            if index is not None:
                route.link("del", index=index)
    except HostError as error:
        # It goes by itself when the namespace of its other end does: maybe meanwhile.
        if error.errno != errno.ENODEV:
            raise

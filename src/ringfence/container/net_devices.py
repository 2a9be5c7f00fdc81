"""Network devices of the host that become a container's: ``linux.netDevices``.

Source: OCI runtime-spec 1.3, config-linux.md, "Network Devices"; runc, which keeps permanent addresses of
global scope.
"""

from __future__ import annotations

import os

from ringfence.errors import ConfigError, HostError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    from ringfence.container.fields import Fields

    class _Address(Protocol):
        """An address as pyroute2 has it."""

        def __getitem__(self, name: str) -> int: ...
        def get_attr(self, name: str) -> str | None: ...

    class _Route(Protocol):
        """What is used of pyroute2's IPRoute."""

        def link(self, command: str, **fields: object) -> object: ...
        def get_addr(self, index: int) -> Iterable[_Address]: ...
        def link_lookup(self, ifname: str) -> list[int]: ...


__all__ = ["check", "move"]

_LONGEST = 15
_PERMANENT = 0x80


def _names(linux: Fields) -> dict[str, str]:
    """Each device of the host with its name in the container."""
    devices = linux.table("netDevices")
    return {name: devices.table(name).text("name") or name for name in devices.values}


def check(linux: Fields, *, has_network: bool) -> None:
    """Refuses what can't be moved.

    Raises:
        ConfigError: A name is none, or the container has no network namespace.
        UnsupportedError: An ordinary user may not.
    """
    names = _names(linux)
    if not names:
        return
    if not has_network:
        message = "unable to move network devices without a NET namespace"
        raise ConfigError(message)
    if os.geteuid() != 0:
        message = "network devices are not supported for rootless containers"
        raise UnsupportedError(message)
    for name in (*names, *names.values()):
        if not 0 < len(name) <= _LONGEST or name in {".", ".."} or set(name) & set("/: \t\n%"):
            message = f"invalid network device name {name!r}"
            raise ConfigError(message)


def move(linux: Fields, pid: int) -> None:
    """Moves the devices into a process's network namespace, with their addresses, and brings them up.

    Raises:
        HostError: One isn't there, or the kernel refuses.
        UnsupportedError: The package ``pyroute2`` is missing.
    """
    names = _names(linux)
    if not names:
        return
    try:
        from pyroute2 import IPRoute  # type: ignore[import-untyped]
        from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]
    except ImportError as error:
        message = "linux.netDevices: the package pyroute2, which moves them, isn't installed"
        raise UnsupportedError(message, hint="pip install pyroute2") from error
    namespace = f"/proc/{pid}/ns/net"
    for name, inside in names.items():
        try:
            with IPRoute() as route:
                addresses = _take(route, name, inside, namespace)
            with IPRoute(netns=namespace) as route:
                index = route.link_lookup(ifname=inside)[0]
                for address, length in addresses:
                    route.addr("add", index=index, address=address, prefixlen=length)
                route.link("set", index=index, state="up")
        except NetlinkError as error:
            message = f"cannot move the network device {name}: {os.strerror(error.code)}"
            raise HostError(message, errno=error.code) from error
        except IndexError as error:
            message = f"the network device {inside} has gone while it was moved"
            raise HostError(message) from error


def _take(route: _Route, name: str, inside: str, namespace: str) -> list[tuple[str, int]]:
    found = route.link_lookup(ifname=name)
    if not found:
        message = f"this host has no network device {name}"
        raise HostError(message, hint="ip link lists them")
    route.link("set", index=found[0], state="down")
    addresses = [
        (entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS") or "", entry["prefixlen"])
        for entry in route.get_addr(index=found[0])
        if entry["scope"] == 0 and entry["flags"] & _PERMANENT
    ]
    # At once: the new name may be taken out here.
    route.link("set", index=found[0], ifname=inside, net_ns_fd=namespace)
    return addresses

"""An interface of the host that becomes a port of a bridge for a while, with the host's addresses safe.

The addresses and routes move to the bridge, which has the interface's Ethernet address, in one
batch; open connections of the host go on. What was moved is written down first, for all users of
this host, so that whoever comes next can move it back, however this process ends.

Source: ``ip-link(8)``, ``ip-address(8)``, ``ip-route(8)``.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ringfence.errors import HostError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "address_on",
    "check",
    "join",
    "leave",
    "master_of",
    "own_addresses",
    "router_on",
    "servers_on",
]

_SYS = Path("/sys/class/net")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# The same one for all users of the host.
_MOVED = Path("/run/ringfence")
_NETNS = Path("/proc/self/ns/net")
_ETHERNET = "1"
_FOREVER = 4294967295
_TIMEOUT_S = 30.0

Address = dict[str, object]


def _ip(*words: str) -> str:
    program = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        message = "the program ip is missing: it moves the host's addresses to a bridge"
        raise UnsupportedError(message, hint="apt install iproute2")
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        message = f"cannot change the host's links: {said[0] if said else ''}"
        raise HostError(message)
    return done.stdout


def check(name: str) -> None:
    """Checks that an interface is, or can be, on a bridge.

    Raises:
        NotFoundError: There is no such interface.
        UnsupportedError: It can't.
    """
    path = _SYS / name
    if "/" in name or name in ("", ".", "..") or not path.exists():
        message = f"this host has no interface {name!r}"
        raise NotFoundError(message, hint="ip link lists them")
    if (path / "bridge").is_dir():
        return
    kind = (path / "type").read_text().strip()
    wireless = (path / "wireless").exists() or (path / "phy80211").exists()
    master = path / "master"
    if master.exists() and not (master / "bridge").is_dir():
        message = f"the interface {name} is part of {master.resolve().name}, which is not a bridge"
        raise UnsupportedError(message, hint=f"--network bridge:{master.resolve().name}")
    if kind != _ETHERNET or wireless:
        what = "wireless" if wireless else "no Ethernet link"
        message = f"the interface {name} is {what}, and can't be on a bridge"
        raise UnsupportedError(message, hint="use --network nat, or another interface")


def master_of(name: str) -> str | None:
    """The bridge that an interface is, or is on, if there is one."""
    path = _SYS / name
    if (path / "bridge").is_dir():
        return name
    master = path / "master"
    return master.resolve().name if master.exists() else None


def _addresses(device: str) -> list[Address]:
    with suppress(HostError, ValueError):
        for link in json.loads(_ip("-j", "addr", "show", "dev", device)):
            found = cast("list[Address]", link.get("addr_info", []))
            return [one for one in found if one.get("scope") != "link"]
    return []


def _routes(device: str) -> list[str]:
    found = []
    for family in ("-4", "-6"):
        with suppress(HostError):
            for line in _ip(family, "route", "show", "dev", device).splitlines():
                # The kernel makes its own with each address.
                if "proto kernel" in line or line.startswith(("fe80:", "multicast", "ff00:")):
                    continue
                words = re.sub(r"(expires \S+|linkdown|dead|onlink)", "", line).strip()
                found.append(f"{family} {words}")
    return found


def _address_words(one: Address) -> str:
    words = f"{one['local']}/{one['prefixlen']}"
    if one.get("broadcast"):
        words += f" broadcast {one['broadcast']}"
    if ":" in str(one["local"]):
        words += " nodad"
    for key, option in (("valid_life_time", "valid_lft"), ("preferred_life_time", "preferred_lft")):
        if int(str(one.get(key, _FOREVER))) != _FOREVER:
            words += f" {option} {one[key]}"
    return words


def _moved(addresses: list[Address], routes: list[str], device: str) -> Iterator[str]:
    """Lines that give a device addresses and routes."""
    for one in addresses:
        yield f"addr replace {_address_words(one)} dev {device}"
    # Routes without a router first: the others go by them.
    for line in sorted(routes, key=lambda line: " via " in line):
        family, _, words = line.partition(" ")
        yield f"{family} route replace {words} dev {device}"


def _batch(lines: list[str], *, whatever: bool = False) -> None:
    for line in lines:
        words = line.split()
        try:
            _ip(*words)
        except HostError:
            if not whatever:
                raise


def _record(name: str) -> Path:
    # Other network namespaces may have interfaces of the same name.
    return _MOVED / f"lan-{_NETNS.stat().st_ino}-{name}.json"


@contextmanager
def _alone() -> Iterator[None]:
    """No other user of this host moves an interface meanwhile.

    Raises:
        HostError: What was moved can't be written down.
    """
    try:
        _MOVED.mkdir(mode=0o755, exist_ok=True)
        fd = os.open(_MOVED / "lan.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        message = f"cannot write to {_MOVED}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(_MOVED)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _read(name: str) -> dict[str, object] | None:
    with suppress(OSError, ValueError):
        found = cast("dict[str, object]", json.loads(_record(name).read_text()))
        # After a start of the host it has what its configuration says.
        if found["boot"] == _BOOT.read_text().strip():
            return found
    return None


def _write(document: dict[str, object]) -> None:
    record = _record(str(document["interface"]))
    fresh = record.with_suffix(".new")
    fresh.write_text(json.dumps(document))
    fresh.rename(record)


def join(name: str, bridge: str, user: str) -> None:
    """Puts an interface on a bridge of its own, with the host's addresses, if it is on none.

    Args:
        name: The interface.
        bridge: The bridge; made here. Another user may have put it on another.
        user: Who needs it there until :func:`leave`.

    Raises:
        HostError: The host refuses; all is as it was.
    """
    with _alone():
        document = _read(name)
        if document is not None and not document["moved"]:
            # Somebody was killed over it.
            _release(document)
        if master_of(name) is None:
            _enslave(name, bridge, user)
        elif document is not None and document["bridge"] == master_of(name):
            users = cast("list[str]", document["users"])
            _write({**document, "users": sorted({*users, user})})


def _enslave(name: str, bridge: str, user: str) -> None:
    mac = (_SYS / name / "address").read_text().strip()
    mtu = (_SYS / name / "mtu").read_text().strip()
    addresses, routes = _addresses(name), _routes(name)
    document = {
        "interface": name,
        "bridge": bridge,
        "boot": _BOOT.read_text().strip(),
        "addresses": addresses,
        "routes": routes,
        "users": [user],
        "moved": False,
    }
    _write(document)
    try:
        _batch(
            [
                f"link add {bridge} address {mac} mtu {mtu} type bridge forward_delay 0",
                f"link set {bridge} up",
                f"link set {name} up master {bridge}",
                *_moved(addresses, routes, bridge),
                *(f"addr del {one['local']}/{one['prefixlen']} dev {name}" for one in addresses),
            ]
        )
    except HostError:
        _release(document)
        raise
    _write({**document, "moved": True})


def leave(name: str, user: str) -> None:
    """Gives an interface back what :func:`join` moved, when nobody else needs it there."""
    if not _record(name).exists():
        return
    with _alone():
        document = _read(name)
        if document is None:
            _record(name).unlink(missing_ok=True)
            return
        users = [one for one in cast("list[str]", document["users"]) if one != user]
        if users:
            _write({**document, "users": users})
        else:
            _release(document)


def _release(document: dict[str, object]) -> None:
    name, bridge = str(document["interface"]), str(document["bridge"])
    # Another bridge is the host's own doing.
    if master_of(name) in (bridge, None):
        # What changed meanwhile is what counts, if the move was done.
        addresses = _addresses(bridge) or cast("list[Address]", document["addresses"])
        routes = _routes(bridge) or cast("list[str]", document["routes"])
        _batch([f"link set {name} nomaster"], whatever=True)
        _batch(list(_moved(addresses, routes, name)), whatever=True)
        _batch([f"link del {bridge}"], whatever=True)
        # What the bridge's end took along.
        _batch(list(_moved([], routes, name)), whatever=True)
    _record(name).unlink(missing_ok=True)


def address_on(bridge: str, text: str) -> str | None:
    """An address with the prefix that it has on a LAN, by the host's own addresses there."""
    import ipaddress  # noqa: PLC0415 - machines on a LAN alone need it

    if "/" in text:
        return text
    for one in _addresses(bridge):
        own = ipaddress.ip_interface(f"{one['local']}/{one['prefixlen']}")
        if ipaddress.ip_address(text) in own.network:
            return f"{text}/{own.network.prefixlen}"
    return None


def own_addresses(bridge: str) -> list[str]:
    """The host's own addresses on a LAN, but for link-local ones."""
    return [str(one["local"]) for one in _addresses(bridge)]


def servers_on(bridge: str, known: Sequence[str]) -> dict[str, str]:
    """By their addresses the LAN's routers and the servers in ``known``, with who they are there."""
    wanted = {*known, *(router_on(bridge, version) or "" for version in (4, 6))}
    found = {}
    with suppress(HostError, ValueError):
        for one in json.loads(_ip("-j", "neigh", "show", "dev", bridge)):
            if one.get("lladdr") and one.get("dst") in wanted:
                found[str(one["dst"])] = str(one["lladdr"])
    return found


def router_on(bridge: str, version: int) -> str | None:
    """The router that the host has on a LAN."""
    family = "-6" if version == 6 else "-4"
    with suppress(HostError):
        for line in _ip(family, "route", "show", "default", "dev", bridge).splitlines():
            words = line.split()
            if "via" in words:
                return words[words.index("via") + 1]
    return None

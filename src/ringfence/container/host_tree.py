"""A machine's root file system, mounts and files as the plan of its container."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, HostError, UnsupportedError
from ringfence.machine import host_root
from ringfence.machine.spec import DirectoryRoot, DiskRoot, HostRoot, ImageRoot

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ringfence.guest.spec import InterfaceSpec
    from ringfence.machine.driver import Place
    from ringfence.machine.spec import MachineSpec, Mount

__all__ = [
    "give_mounts",
    "hostname",
    "mount_plan",
    "remove_copy",
    "root_plan",
    "tell_network",
]

_LOG = logging.getLogger(__name__)

_PROGRAMS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_EMPTY = (
    "home", "media", "mnt", "opt", "root", "run", "srv",
    "var/cache", "var/lib", "var/log", "var/spool",
)  # fmt: skip
_GENERATED = ("group", "machine-id", "mtab", "passwd", "resolv.conf")
_OPEN = ("tmp", "var/tmp")
# MOUNT_ATTR_*: read only, no setuid, no devices.
_READ_ONLY, _VOLUME = 1, 2 | 4
_COPY = "copy"
_STICKY = 0o1777
# How long what was seen of /etc is believed.
_LOOKED_S = 60.0


def root_plan(
    spec: MachineSpec, place: Place, stack: ExitStack, *, own_users: bool
) -> dict[str, object]:
    """The root's part of the plan: what it is made of, not yet what every container has.

    Args:
        spec: The machine.
        place: Where its empty directory for the root is made.
        stack: Gets what is to be let go of with the machine.
        own_users: The container has a user namespace: overlays keep their notes in user xattrs.

    Raises:
        UnsupportedError: A container can't have such a root.
    """
    path = place.folder / "root"
    path.mkdir(exist_ok=True)
    plan: dict[str, object] = {"path": str(path), "files": _files(spec, place)}
    overlay: dict[str, object] = {
        # Pages of it count as the container's memory, which has a limit of its own.
        "memory": "mode=755",
        # Where the kernel or its policy has no overlay for us, which is rare.
        "copy": str(place.folder / _COPY),
        "options": ["userxattr"] if own_users else [],
    }
    match spec.root:
        case HostRoot():
            seen = _look()
            overlay["parts"] = _host_parts(seen)
            plan["links"] = [("/etc/mtab", "../proc/self/mounts"), ("/var/run", "/run"), *_links()]
            plan["directories"] = [(f"/{name}", 0o755) for name in _EMPTY]
            plan["files"] = [*seen.accounts, *_files(spec, place)]
        case DirectoryRoot() if spec.root.writable:
            return {**plan, "path": str(spec.root.path.resolve()), "files": []}
        case DirectoryRoot():
            overlay["lower"] = [str(spec.root.path.resolve())]
        case ImageRoot():
            overlay["lower"] = _layers(spec.root, stack)
        case DiskRoot():
            message = "a container has no disk: only a machine with a kernel of its own has"
            raise UnsupportedError(message, hint="use --engine auto")
    plan["overlay"] = overlay
    plan["directories"] = [*_listed(plan.get("directories")), *((f"/{n}", _STICKY) for n in _OPEN)]
    return plan


def remove_copy(place: Place) -> None:
    """Removes what was copied in place of an overlay."""
    path = place.folder / _COPY
    if path.exists():
        from ringfence.image.rootfs import remove_tree

        remove_tree(path)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _host_parts(seen: _Seen) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"target": "/usr", "lower": "/usr", "hide": seen.usr}]
    for name in _PROGRAMS:
        path = f"/{name}"
        if not os.path.islink(path) and os.path.isdir(path):
            parts.append({"target": path, "lower": path})
    parts.append({"target": "/etc", "lower": "/etc", "hide": seen.etc, "copy": True})
    return parts


class _Seen:
    """What was seen of the host's ``/usr`` and ``/etc``, and of which state of their directories."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self.folders = ["/usr", *(folder for folder, _below, _files in os.walk("/etc"))]
        self.changes = _changes(self.folders)
        self.usr = _private_usr()
        # What gets a text of its own is hidden too: the host's can't be replaced by users.
        hidden = {*host_root.hidden_in_etc(Path("/etc")), *_GENERATED}
        self.etc = sorted(name for name in hidden if os.path.lexists(f"/etc/{name}"))
        self.accounts = _accounts()


_seen: list[_Seen] = []


def _look() -> _Seen:
    """What is to be known of the host, remembered while no directory changes, for a minute."""
    seen = _seen[0] if _seen else None
    if (
        seen is None
        or time.monotonic() - seen.at > _LOOKED_S
        or _changes(seen.folders) != seen.changes
    ):
        seen = _Seen()
        _seen[:] = [seen]
    return seen


def _changes(folders: list[str]) -> list[int]:
    try:
        return [os.stat(folder).st_ctime_ns for folder in folders]
    except OSError:
        # One has gone while it was looked at: nothing equals this, itself of another time neither.
        return [time.monotonic_ns()]


def _private_usr() -> list[str]:
    hidden = ["local/etc"] if os.path.isdir("/usr/local/etc") else []
    with os.scandir("/usr") as found:
        for entry in found:
            needed = 0o5 if entry.is_dir() else 0o4
            if entry.stat(follow_symlinks=False).st_mode & needed != needed:
                hidden.append(entry.name)
    return hidden


def _links() -> list[tuple[str, str]]:
    found = []
    for name in _PROGRAMS:
        path = f"/{name}"
        if os.path.islink(path):
            found.append((path, os.readlink(path)))
    return found


def _accounts() -> list[tuple[str, str]]:
    return [
        ("/etc/passwd", "".join(host_root.passwd_lines())),
        ("/etc/group", "".join(host_root.group_lines())),
        ("/etc/machine-id", ""),
    ]


def hostname(spec: MachineSpec, place: Place) -> str:
    """What the machine calls itself."""
    return spec.hostname or place.name.replace("_", "-").replace(".", "-")[:63]


def _files(spec: MachineSpec, place: Place) -> list[tuple[str, str]]:
    name = hostname(spec, place)
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost", f"127.0.1.1 {name}"]
    lines += [f"{address} {host}" for host, address in spec.hosts.items()]
    return [("/etc/hostname", f"{name}\n"), ("/etc/hosts", "\n".join(lines) + "\n")]


def tell_network(plan: dict[str, object], interfaces: list[InterfaceSpec]) -> None:
    """Adds where names are asked for to a plan whose root is the container's own."""
    root = plan["root"]
    files = root.get("files") if isinstance(root, dict) else None
    servers = [address for interface in interfaces for address in interface.dns]
    if not isinstance(files, list) or not files or not servers:
        return
    lines = [f"nameserver {address}" for address in servers]
    search = [domain for interface in interfaces for domain in interface.search]
    if search:
        lines.append(f"search {' '.join(search)}")
    files.append(("/etc/resolv.conf", "\n".join(lines) + "\n"))


def _layers(root: ImageRoot, stack: ExitStack) -> list[str]:
    from ringfence.image import Store

    store = Store()
    image = store.get(root.reference)
    tree = stack.enter_context(store.rootfs(image, mapped=True))
    return [str(path) for path in reversed(tree.layers)]


def give_mounts(mounts: list[dict[str, object]], spec: MachineSpec, stack: ExitStack) -> list[int]:
    """Gives what is mounted of the host to the user who runs commands, as in a virtual machine.

    Where the kernel or a file system can't, owners stay as they are on the host.

    Args:
        mounts: See :func:`mount_plan`.
        spec: Says who runs commands.
        stack: Lets go of what is returned.

    Returns:
        Descriptors that the plan names.
    """
    user, group = _owner(spec)
    if not mounts or os.geteuid() != 0 or user == 0:
        return []
    from ringfence.container import sources

    found = []
    for mount in mounts:
        try:
            tree = sources.tree_of_owner(str(mount["source"]), user, group)
        except HostError as error:
            _LOG.debug("%s keeps its owners: %s", mount["source"], error)
            continue
        stack.callback(os.close, tree)
        mount["tree"] = tree
        found.append(tree)
    return found


def _owner(spec: MachineSpec) -> tuple[int, int]:
    """User and group that run commands; the root where they aren't known before the start."""
    user, _, group = spec.user.partition(":")
    if user.isdigit():
        return int(user), int(group) if group.isdigit() else int(user)
    if user and isinstance(spec.root, HostRoot):
        for line in host_root.passwd_lines():
            fields = line.split(":")
            if fields[0] == user:
                return int(fields[2]), int(fields[3])
    return 0, 0


def mount_plan(mounts: tuple[Mount, ...]) -> list[dict[str, object]]:
    """What of the host the container sees besides: no setuid programs and no devices in it.

    Raises:
        ConfigError: A source is neither a file nor a directory.
    """
    found: list[dict[str, object]] = []
    for mount in mounts:
        source: Path = mount.source.resolve()
        if not (source.is_dir() or source.is_file()):
            message = f"{source} can't be mounted: it is neither a directory nor a file"
            raise ConfigError(message)
        attributes = _VOLUME | (_READ_ONLY if mount.read_only else 0)
        found.append(
            {
                "target": str(mount.target),
                "source": str(source),
                "recursive": True,
                "set_below": attributes,
            }
        )
    return found

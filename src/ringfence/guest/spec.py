"""What the host asks of a guest: how it is set up, and what runs in it.

These are plain values. They are checked where they are made; the agent checks again what it is sent
(docs/reference/agent-protocol.md).
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "ExecSpec",
    "GuestSetup",
    "InterfaceSpec",
    "LayerKind",
    "LayerSpec",
    "MountSpec",
    "MountType",
    "Privileges",
    "RootSpec",
    "TerminalSize",
    "Writable",
]

_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


class LayerKind(enum.Enum):
    """Where one layer of a root file system comes from."""

    VIRTIOFS = "virtiofs"
    BLOCK = "block"
    DIRECTORY = "directory"


class Writable(enum.Enum):
    """What becomes of what a guest writes to its root file system."""

    OVERLAY = "overlay"
    """It stays in the guest's memory and is gone with the machine."""
    DIRECT = "direct"
    """It goes to the layer itself: there must be one only."""
    NO = "no"
    """Writing is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer of a root file system.

    Args:
        kind: Where it comes from.
        source: A virtio-fs tag; a block device as ``/dev/vda`` or ``serial:NAME`` (the disk of that
            serial number), with ``/PARTITION`` behind it if need be: a number, or ``any`` for
            the whole disk or else its largest partition with a file system; or a directory
            of the initramfs.
        filesystem: Of a block device: ``ext4``, ``erofs`` and others that the kernel has; ``auto``
            lets the guest look.
        subpath: The directory of the file system to take, ``/`` for all of it.
    """

    kind: LayerKind
    source: str
    filesystem: str = ""
    subpath: str = "/"

    def __post_init__(self) -> None:
        """Refuses a block device of an unsaid file system."""
        if self.kind is LayerKind.BLOCK and not self.filesystem:
            message = f"the file system of block device {self.source} is not said"
            raise ConfigError(message, hint="name it: ext4, erofs, …; auto lets the guest look")


@dataclass(frozen=True, slots=True, kw_only=True)
class RootSpec:
    """How a guest's root file system is put together.

    Args:
        layers: Lowest first. With more than one they are joined by overlayfs.
        writable: What becomes of writes.
        upper_mib: The most that an overlay may hold, in MiB; None leaves half of the guest's memory.
    """

    layers: tuple[LayerSpec, ...]
    writable: Writable = Writable.OVERLAY
    upper_mib: int | None = None

    def __post_init__(self) -> None:
        """Refuses no layers, and direct writes to more than one."""
        if not self.layers:
            message = "a root file system has at least one layer"
            raise ConfigError(message)
        if self.writable is Writable.DIRECT and len(self.layers) > 1:
            message = "writes can't go directly to a root file system of several layers"
            raise ConfigError(message)

    @classmethod
    def virtiofs(cls, tag: str, *, writable: Writable = Writable.OVERLAY) -> RootSpec:
        """A root of one shared tree."""
        layer = LayerSpec(kind=LayerKind.VIRTIOFS, source=tag)
        return cls(layers=(layer,), writable=writable)

    @classmethod
    def block(
        cls, source: str, filesystem: str, *, writable: Writable = Writable.OVERLAY
    ) -> RootSpec:
        """A root of one disk."""
        layer = LayerSpec(kind=LayerKind.BLOCK, source=source, filesystem=filesystem)
        return cls(layers=(layer,), writable=writable)


class MountType(enum.Enum):
    """What is mounted."""

    VIRTIOFS = "virtiofs"
    BLOCK = "block"
    BIND = "bind"
    TMPFS = "tmpfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSpec:
    """One mount in the guest's root, done in the order given; missing targets are made.

    ``/proc``, ``/sys``, ``/dev``, ``/dev/pts``, ``/dev/shm``, ``/run`` and ``/tmp`` are there always.

    Args:
        type: What is mounted.
        target: Where: an absolute path.
        source: A virtio-fs tag, a block device (as in :class:`LayerSpec`), or the bound path.
        subpath: Of a virtio-fs or block file system, the directory or file to take. Several
            mounts of one tag share one file system.
        filesystem: Of a block device.
        options: Further options of the file system, as ``mount -o`` has them.
        read_only: Refuse writes.
    """

    type: MountType
    target: str
    source: str = ""
    subpath: str = "/"
    filesystem: str = ""
    options: str = ""
    read_only: bool = False

    def __post_init__(self) -> None:
        """Refuses a relative target."""
        if not self.target.startswith("/"):
            message = f"mount target {self.target!r} is not an absolute path"
            raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceSpec:
    """One network interface, told from others by its MAC address.

    Args:
        mac: ``02:00:00:00:00:01``.
        addresses: ``10.0.0.2/24``, ``fd00::2/64``.
        gateways: At most one of each family.
        dns: Name servers.
        search: Domains that short names are looked up in.
        mtu: Bytes; None keeps the device's.
        name: The guest's name for it; empty keeps the kernel's (``eth0``).
    """

    mac: str
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    mtu: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        """Refuses what is no address."""
        for text in self.addresses:
            _check(ipaddress.ip_interface, text, "address with prefix")
        for text in (*self.gateways, *self.dns):
            _check(ipaddress.ip_address, text, "address")


def _check(parse: Callable[[str], object], text: str, what: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        message = f"{text!r} is no {what}: {error}"
        raise ConfigError(message) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSetup:
    """All that an agent is told before the first command.

    Args:
        root: The root file system.
        hostname: The guest's name.
        mounts: Further mounts, in order.
        interfaces: Network interfaces; the loopback is always there.
        hosts: Further lines of ``/etc/hosts``: name to address.
        sysctls: Kernel parameters, as ``net.ipv4.ip_forward``.
        limits: Resource limits of every command: ``nofile`` to (soft, hard).
    """

    root: RootSpec
    hostname: str = "ringfence"
    mounts: tuple[MountSpec, ...] = ()
    interfaces: tuple[InterfaceSpec, ...] = ()
    hosts: Mapping[str, str] = field(default_factory=lambda: _NO_VARIABLES)
    sysctls: Mapping[str, str] = field(default_factory=lambda: _NO_VARIABLES)
    limits: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalSize:
    """The size of a terminal in characters."""

    columns: int = 80
    rows: int = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Privileges:
    """What a command may do beyond being its user, in the kernel's own numbers.

    Args:
        groups: Further groups, in place of those that the guest's files give the user.
        umask: Its file mode creation mask.
        capabilities: ``bounding``, ``effective``, ``permitted``, ``inheritable`` and ``ambient``, a
            bit each; without them it has what its user has.
        no_new_privileges: Nothing that it runs gets more, as setuid programs would.
        limits: Each ``RLIMIT_*`` with its soft and its hard value.
        oom_score_adj: How willingly the guest's kernel kills it for memory, -1000 to 1000.
        seccomp: A filter of system calls: flags, and ``struct sock_filter`` of each instruction in
            hexadecimal.
    """

    groups: tuple[int, ...] | None = None
    umask: int | None = None
    capabilities: Mapping[str, int] | None = None
    no_new_privileges: bool = False
    limits: tuple[tuple[int, int, int], ...] = ()
    oom_score_adj: int | None = None
    seccomp: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecSpec:
    """One command.

    Args:
        argv: The program, searched in the command's PATH, and its arguments.
        env: Variables. PATH, HOME, USER and, with a terminal, TERM are added unless given.
        cwd: The working directory; empty is the user's home directory.
        user: ``NAME``, ``UID``, ``NAME:GROUP`` or ``UID:GID`` as the guest's own files know them;
            empty is root.
        terminal: With it the command has a terminal of that size: one stream both ways.
        stdin: Without it standard input is empty.
        timeout_s: Seconds after which the guest kills the command and what it started; None never.
        privileges: What it may do; None: what its user may.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: _NO_VARIABLES)
    cwd: str = "/"
    user: str = ""
    terminal: TerminalSize | None = None
    stdin: bool = True
    timeout_s: float | None = None
    privileges: Privileges | None = None

    def __post_init__(self) -> None:
        """Refuses an empty command and names that no process can have."""
        if not self.argv or not self.argv[0]:
            message = "there is no command"
            raise ConfigError(message, hint="give a program and its arguments")
        for text in (*self.argv, *self.env.keys(), *self.env.values(), self.cwd, self.user):
            if "\0" in text:
                message = f"{text!r} has a zero byte in it, which no argument can have"
                raise ConfigError(message)
        for name in self.env:
            if not name or "=" in name:
                message = f"{name!r} is no name of a variable"
                raise ConfigError(message)

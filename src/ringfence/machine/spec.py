"""What a machine is: everything that is said before it starts, checked when it is said."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Self

from ringfence.errors import ConfigError
from ringfence.network.options import LinkSpec
from ringfence.network.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DirectoryRoot",
    "DiskFormat",
    "DiskRate",
    "DiskRoot",
    "EngineName",
    "HostRoot",
    "HugePages",
    "ImageRoot",
    "MachineSpec",
    "Mount",
    "Root",
    "Timeouts",
    "root_words",
]

EngineName = Literal["auto", "kvm", "bt", "container"]
ENGINES: tuple[EngineName, ...] = ("auto", "kvm", "bt", "container")

DiskFormat = Literal["raw", "qcow2"]

HugePages = Literal["off", "transparent", "reserved"]
HUGE_PAGES: tuple[HugePages, ...] = ("off", "transparent", "reserved")

MIN_MEMORY_MIB = 64
MAX_VCPUS = 32
MAX_PARTITION = 255

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
_FILESYSTEM = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")


def _check_whole(what: str, value: object) -> None:
    if not isinstance(value, int):
        message = f"{what} must be a whole number, not {value!r}"
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRoot:
    """The host's own programs, read only, under a writable layer in memory.

    ``/usr`` and what belongs to it, and ``/etc`` without secrets. No home directories, keys or
    sockets.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryRoot:
    """A directory of the host as the root file system.

    Args:
        path: The directory.
        writable: The guest changes the directory itself; else its changes stay in memory.
    """

    path: Path
    writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRoot:
    """A disk image as the root file system.

    Args:
        path: The image file.
        format: How it is stored. Always said, never guessed: a guest can write any header.
        writable: The guest changes the image itself; else its changes stay in memory.
        partition: The partition's number; 0 is the whole disk. When None the guest looks: the whole
            disk, else its largest partition with a file system.
        filesystem: What is on it, as ``mount -t`` names it. When empty the guest looks: ext4, xfs,
            btrfs, erofs, squashfs and iso9660 are known.
    """

    path: Path
    format: DiskFormat
    writable: bool = False
    partition: int | None = None
    filesystem: str = ""

    def __post_init__(self) -> None:
        """Checks what can be checked without looking at the image.

        Raises:
            ConfigError: There can't be such a partition or file system.
        """
        if self.partition is not None and not 0 <= self.partition <= MAX_PARTITION:
            message = f"a disk has partitions 1 to {MAX_PARTITION}, not {self.partition}"
            raise ConfigError(message, hint="0 is the whole disk")
        if self.filesystem and not _FILESYSTEM.fullmatch(self.filesystem):
            message = f"{self.filesystem!r} is not the name of a file system"
            raise ConfigError(message, hint="write it as mount -t does: ext4, xfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """How fast each disk of a machine may be; None is as fast as it goes.

    Args:
        bytes_per_s: Bytes a second, read and written together.
        requests_per_s: Requests a second.
    """

    bytes_per_s: int | None = None
    requests_per_s: int | None = None

    def __post_init__(self) -> None:
        """Checks that something gets through.

        Raises:
            ConfigError: Nothing would.
        """
        for value in (self.bytes_per_s, self.requests_per_s):
            if value is not None and value < 1:
                message = f"a disk's limit must be at least 1 a second, not {value}"
                raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRoot:
    """An OCI image as the root file system.

    Args:
        reference: As registries name it: ``debian:12``.
    """

    reference: str


Root = HostRoot | DirectoryRoot | DiskRoot | ImageRoot


def root_words(root: Root) -> str:
    """A root file system in a word or a path, as ``ps`` shows it."""
    match root:
        case HostRoot():
            return "host"
        case DirectoryRoot(path=path) | DiskRoot(path=path):
            return str(path)
        case ImageRoot(reference=reference):
            return reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A directory or file of the host that the guest sees.

    Args:
        source: On the host.
        target: Absolute path in the guest.
        read_only: The guest can't change it.
    """

    source: Path
    target: PurePosixPath
    read_only: bool = True

    def __post_init__(self) -> None:
        """Checks the target.

        Raises:
            ConfigError: It isn't an absolute path of plain names.
        """
        if not self.target.is_absolute() or ".." in self.target.parts or len(self.target.parts) < 2:
            message = f"a mount's target must be an absolute path below /, not {str(self.target)!r}"
            raise ConfigError(message)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A mount as the command line writes it: ``SRC:DST[:ro|:rw]``.

        Raises:
            ConfigError: It isn't of that form.
        """
        source, *rest = text.split(":")
        if (
            not source
            or len(rest) not in (1, 2)
            or (len(rest) == 2 and rest[1] not in ("ro", "rw"))
        ):
            message = f"{text!r} is not a mount"
            raise ConfigError(message, hint="write SRC:DST, SRC:DST:ro or SRC:DST:rw")
        # Docker's habit: writable unless said.
        read_only = len(rest) == 2 and rest[1] == "ro"
        source_path = Path(source).expanduser().absolute()
        return cls(source=source_path, target=PurePosixPath(rest[0]), read_only=read_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long things may take, in seconds; None is without end.

    Args:
        machine_s: The machine's whole life, from start.
        command_s: Each command.
        idle_s: Without any command running.
        boot_s: From start until the guest takes commands.
    """

    machine_s: float | None = None
    command_s: float | None = None
    idle_s: float | None = None
    boot_s: float = 120.0

    def __post_init__(self) -> None:
        """Checks that every time is positive.

        Raises:
            ConfigError: One isn't.
        """
        for name in ("machine_s", "command_s", "idle_s", "boot_s"):
            value: float | None = getattr(self, name)
            if value is not None and not value > 0:
                message = f"the timeout {name} must be more than 0 seconds, not {value}"
                raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """Everything that is said of a machine before it starts.

    Args:
        name: As ``ps`` shows it; made up when empty.
        engine: What runs it; ``auto`` takes the best that this host has, as measured.
        vcpus: Virtual processors, 1 to 32.
        memory_mib: RAM.
        huge_pages: Which pages of the host its RAM is made of: ordinary ones, huge ones where the kernel
            has some, or those that were reserved.
        root: Its root file system.
        mounts: Further parts of the host that it sees.
        workdir: Where commands run; made in the guest when missing.
        env: Added to each command's environment.
        user: Who runs commands: ``NAME``, ``UID`` or ``UID:GID``.
        network: How it is connected: ``none``, ``user``, ``nat``, ... or a network's name, with
            ``,ip=ADDRESS`` and ``,mac=MAC`` if need be.
        networks: Further networks, each by an interface of its own.
        ports: Published ports, as ``[IP:]HOST:GUEST[/udp]``.
        policy: Who it may reach.
        dns: Name servers to ask instead of the host's.
        hosts: Names to addresses that its network answers.
        bandwidth: Bytes a second that it may send, and receive; None is as many as go.
        disk_rate: How fast each of its disks may be.
        hostname: Its name for itself; the machine's name when empty.
        entrypoint: What comes before a command, in place of the image's; None is the image's own.
        kernel: A kernel's version or image; the newest at hand when None.
        timeouts: How long things may take.

    Raises:
        ConfigError: A value is outside of what is possible.
    """

    name: str = ""
    engine: EngineName = "auto"
    vcpus: int = 1
    memory_mib: int = 512
    huge_pages: HugePages = "off"
    root: Root = field(default_factory=HostRoot)
    mounts: tuple[Mount, ...] = ()
    workdir: str = ""
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    user: str = ""
    network: str = "none"
    networks: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    policy: Policy = field(default_factory=Policy)
    dns: tuple[str, ...] = ()
    hosts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    bandwidth: int | None = None
    disk_rate: DiskRate = field(default_factory=DiskRate)
    hostname: str = ""
    entrypoint: tuple[str, ...] | None = None
    kernel: str | Path | None = None
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        """Checks what can be checked without looking at the host."""
        if self.name and not _NAME.fullmatch(self.name):
            message = f"{self.name!r} is not a name for a machine"
            hint = "use letters, digits, '_', '.' and '-', at most 63, a letter or digit first"
            raise ConfigError(message, hint=hint)
        if self.hostname and not _HOSTNAME.fullmatch(self.hostname):
            message = f"{self.hostname!r} is not a host name"
            raise ConfigError(message, hint="use letters, digits and '-', at most 63")
        if self.engine not in ENGINES:
            message = f"there is no engine {self.engine!r}"
            raise ConfigError(message, hint=f"choose one of {', '.join(ENGINES)}")
        _check_whole("vcpus", self.vcpus)
        _check_whole("the memory in MiB", self.memory_mib)
        if not 1 <= self.vcpus <= MAX_VCPUS:
            message = f"a machine has 1 to {MAX_VCPUS} vCPUs, not {self.vcpus}"
            raise ConfigError(message)
        if self.memory_mib < MIN_MEMORY_MIB:
            message = (
                f"a machine needs at least {MIN_MEMORY_MIB} MiB of memory, not {self.memory_mib}"
            )
            raise ConfigError(message)
        if self.huge_pages not in HUGE_PAGES:
            message = f"there are no huge pages {self.huge_pages!r}"
            raise ConfigError(message, hint=f"choose one of {', '.join(HUGE_PAGES)}")
        if self.workdir and not self.workdir.startswith("/"):
            message = f"the working directory must be an absolute path, not {self.workdir!r}"
            raise ConfigError(message)
        if self.disk_rate != DiskRate() and not isinstance(self.root, DiskRoot | ImageRoot):
            message = "a disk's limit was given, and this machine has no disk"
            raise ConfigError(message, hint="only --disk and --image make one")
        self._check_mounts()
        self._check_env()
        networks = [link.network for link in self.links]
        for name in networks:
            if networks.count(name) > 1:
                message = f"the machine would be on the network {name} twice"
                raise ConfigError(message)

    @property
    def links(self) -> tuple[LinkSpec, ...]:
        """Its interfaces."""
        found = [LinkSpec.parse(text) for text in (self.network, *self.networks)]
        if found[0].network == "none" and (len(found) > 1 or found[0] != LinkSpec(network="none")):
            message = "a machine without a network has neither addresses nor further networks"
            raise ConfigError(message)
        return () if found[0].network == "none" else tuple(found)

    def _check_mounts(self) -> None:
        targets = [mount.target for mount in self.mounts]
        for target in targets:
            if targets.count(target) > 1:
                message = f"two mounts have the same target {target}"
                raise ConfigError(message)

    def _check_env(self) -> None:
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                message = f"{name!r} can't be the name of an environment variable"
                raise ConfigError(message)

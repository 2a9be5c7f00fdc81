"""Looks at the host before anything is started: what was asked for must be there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, HostError, NotFoundError, UnsupportedError
from ringfence.machine import disk
from ringfence.machine.spec import DirectoryRoot, DiskRate, DiskRoot

if TYPE_CHECKING:
    from ringfence.machine.spec import MachineSpec

__all__ = ["check_container", "check_host", "host_memory_mib"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_host(spec: MachineSpec) -> None:
    """Checks a machine against this host.

    Raises:
        ConfigError: More is asked for than there is, or a path is of the wrong kind.
        NotFoundError: A path doesn't exist.
        FormatError: A disk image is corrupt.
        HostError: A path can't be read.
    """
    _check_memory(spec.memory_mib)
    for mount in spec.mounts:
        _check_readable(mount.source, "the mount's source")
        if not (mount.source.is_dir() or mount.source.is_file()):
            message = f"{mount.source} can't be mounted: it is neither a directory nor a file"
            raise ConfigError(message)
    if isinstance(spec.root, DirectoryRoot):
        _check_readable(spec.root.path, "the root directory")
        if not spec.root.path.is_dir():
            message = f"the root {spec.root.path} is not a directory"
            raise ConfigError(message, hint="for a disk image use --disk")
    if isinstance(spec.root, DiskRoot):
        disk.chain(spec.root.path, spec.root.format)
        if spec.root.writable and not os.access(spec.root.path, os.W_OK):
            message = f"the disk image {spec.root.path} can't be written by this user"
            raise HostError(message, path=str(spec.root.path))


def check_container(spec: MachineSpec) -> None:
    """Refuses what only a machine with a kernel of its own has.

    Raises:
        UnsupportedError: It is asked for.
    """
    if spec.kernel is not None:
        message = "a container has the host's kernel, so it can't be given one"
        raise UnsupportedError(message, hint="use --engine auto")
    if spec.disk_rate != DiskRate() or spec.huge_pages != "off":
        message = "a container has neither disks that can be limited nor RAM of its own"
        raise UnsupportedError(message, hint="use --engine auto")


def _check_readable(path: Path, what: str) -> None:
    if not path.exists():
        message = f"{what} {path} does not exist"
        raise NotFoundError(message)
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        message = f"{what} {path} can't be read by this user"
        raise HostError(message, path=str(path))


def _check_memory(wanted_mib: int) -> None:
    there = host_memory_mib()
    if there is not None and wanted_mib > there:
        message = f"{wanted_mib} MiB of memory were asked for, and this host has {there} MiB"
        raise ConfigError(message, hint=f"ask for less: --memory {max(256, there // 2)}M")


def host_memory_mib() -> int | None:
    """The memory that this process could ever get; None where the host doesn't say."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        total = _MEMINFO.read_text().partition("MemTotal:")[2].split()[0]
        found.append(int(total) // 1024)
    with suppress(OSError):
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit.isdigit():
            found.append(int(limit) >> 20)
    return min(found, default=None)

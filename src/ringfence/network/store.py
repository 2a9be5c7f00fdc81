"""What is known of networks and of the machines on them, between processes.

A network's directory holds ``network.json`` and a file for each machine on it, which the machine's
holder keeps locked for as long as it lives. So a machine whose holder died, however it died, is
seen by whoever looks next, and what it left is taken away.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ringfence import _paths
from ringfence.errors import ConfigError, ConflictError, NotFoundError
from ringfence.network.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.network.policy import Action

__all__ = ["MODES", "Member", "NetworkSpec", "Store"]

MODES = ("user", "isolated", "nat", "host-only", "routed", "bridge")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,31}")
_RESERVED = ("none", "user")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """A network.

    Args:
        name: Its name.
        mode: One of :data:`MODES`.
        subnets: Its IPv4 and its IPv6 subnet; none in the mode ``bridge``.
        mtu: The largest packet, in bytes; chosen when 0.
        interface: The host's, in the mode ``bridge``.
        allow: Egress rules of all its machines.
        deny: Likewise.
        default: What becomes of what no rule is about; see :class:`Policy`.
        resolve_all: Names are resolved even if no rule allows them.
        leases: Addresses kept for machines, ``NAME=ADDRESS``.
        created_s: Since the epoch.
        implicit: It was made by a machine that named a mode, and goes with its last one.
    """

    name: str
    mode: str
    subnets: tuple[str, ...] = ()
    mtu: int = 0
    interface: str = ""
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    default: Action | None = None
    resolve_all: bool = False
    leases: tuple[str, ...] = ()
    created_s: float = 0.0
    implicit: bool = False

    @property
    def policy(self) -> Policy:
        """The egress rules of all its machines."""
        return Policy(
            allow=self.allow, deny=self.deny, default=self.default, resolve_all=self.resolve_all
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A machine on a network.

    Args:
        machine_id: Its ID.
        name: Its name there.
        mac: Its Ethernet address.
        addresses: Its IP addresses.
        link: The host's link to it, if it has one.
        publish: Published ports, as they are written.
        allow: Egress rules of its own.
        deny: Likewise.
        default: What becomes of what no rule is about; see :class:`Policy`.
        resolve_all: Names are resolved even if no rule allows them.
        send_bytes_per_s: How fast the host's kernel lets it send; as fast as it goes when None.
        receive_bytes_per_s: Likewise.
        dns: Name servers that it wants asked, instead of the host's.
        frames: Who moves a VM's frames between its card and the host's link: ``vhost-net`` or
            ``vm process``.
        routers: Its ways outside, on a LAN.
        held: On a LAN, it may have no other IPv4 address than this.
    """

    machine_id: str
    name: str
    mac: str
    addresses: tuple[str, ...] = ()
    link: str = ""
    publish: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    default: Action | None = None
    resolve_all: bool = False
    send_bytes_per_s: int | None = None
    receive_bytes_per_s: int | None = None
    dns: tuple[str, ...] = ()
    frames: str = ""
    routers: tuple[str, ...] = ()
    held: bool = False

    @property
    def policy(self) -> Policy:
        """Its own egress rules."""
        return Policy(
            allow=self.allow, deny=self.deny, default=self.default, resolve_all=self.resolve_all
        )


def _tuples(found: dict[str, object]) -> dict[str, object]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }


class Store:
    """All networks of this user."""

    def __init__(self) -> None:
        self.path = _paths.state_dir() / "networks"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes networks meanwhile."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def folder(self, name: str) -> Path:
        """A network's directory."""
        return self.path / "by-name" / name

    def names(self) -> list[str]:
        """All networks."""
        try:
            return sorted(path.parent.name for path in self.path.glob("by-name/*/network.json"))
        except OSError:
            return []

    def get(self, name: str) -> NetworkSpec | None:
        """A network, if there is one of that name."""
        try:
            text = (self.folder(name) / "network.json").read_text()
        except OSError:
            return None
        return NetworkSpec(**_tuples(json.loads(text)))  # type: ignore[arg-type]

    def find(self, name: str) -> NetworkSpec:
        """A network.

        Raises:
            NotFoundError: There is none of that name.
        """
        found = self.get(name) if _NAME.fullmatch(name) else None
        if found is None:
            message = f"there is no network {name!r}"
            hint = f"ringfence network create {name} makes one; ringfence network ls lists them"
            raise NotFoundError(message, hint=hint)
        return found

    def add(self, spec: NetworkSpec) -> None:
        """Writes a new network.

        Raises:
            ConfigError: It can't have that name.
            ConflictError: There is one of that name.
        """
        reserved = spec.name in _RESERVED or (spec.name in MODES and not spec.implicit)
        if not _NAME.fullmatch(spec.name) or reserved:
            message = f"a network can't be called {spec.name!r}"
            hint = "letters, digits, '_', '.' and '-', at most 32; not a mode's name"
            raise ConfigError(message, hint=hint)
        if self.get(spec.name) is not None:
            message = f"there is a network {spec.name} already"
            raise ConflictError(message, hint=f"ringfence network rm {spec.name}")
        self.write(dataclasses.replace(spec, created_s=spec.created_s or time.time()))

    def write(self, spec: NetworkSpec) -> None:
        """Writes what is known of a network, whole."""
        folder = self.folder(spec.name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fields = asdict(spec)
        fresh = folder / ".network.json"
        fresh.write_text(json.dumps(fields, indent=1) + "\n")
        fresh.rename(folder / "network.json")

    def remove(self, name: str) -> None:
        """Forgets a network."""
        shutil.rmtree(self.folder(name), ignore_errors=True)

    def _member_path(self, network: str, machine_id: str) -> Path:
        return self.folder(network) / f"{machine_id}.member"

    def join(self, network: str, member: Member) -> int:
        """Writes a machine down; returns the descriptor that holds it there.

        Raises:
            ConflictError: It is on that network already.
        """
        path = self._member_path(network, member.machine_id)
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            message = f"the machine {member.name} is on the network {network} already"
            raise ConflictError(message) from error
        self.rewrite(network, member)
        return fd

    def rewrite(self, network: str, member: Member) -> None:
        """Writes what is known of a machine anew, whoever holds it."""
        path = self._member_path(network, member.machine_id)
        # In place: the lock is the file's.
        with path.open("r+b") as file:
            file.truncate(0)
            file.write(json.dumps(asdict(member)).encode())

    def note_frames(self, network: str, machine_id: str, frames: str) -> None:
        """Writes down who moves a machine's frames."""
        with self.locked():
            for member, _ in self.members(network):
                if member.machine_id == machine_id:
                    self.rewrite(network, dataclasses.replace(member, frames=frames))

    def leave(self, network: str, machine_id: str) -> None:
        """Forgets a machine."""
        with suppress(OSError):
            self._member_path(network, machine_id).unlink(missing_ok=True)

    def members(self, network: str) -> list[tuple[Member, bool]]:
        """The machines on a network, and whether their holders live."""
        found = []
        for path in sorted(self.folder(network).glob("*.member")):
            with suppress(OSError, ValueError, TypeError), path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    lives = False
                except OSError:
                    lives = True
                fields = _tuples(json.load(file))
                found.append((Member(**fields), lives))  # type: ignore[arg-type]
        return found

"""The agent in a container, told what of the host's figures are the container's own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ringfence.container.cgroups import files
from ringfence.guest.agent import Agent

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ringfence.container.cgroups.group import Group
    from ringfence.guest.agent import GuestStats

__all__ = ["ContainedAgent"]

_PERIOD_US = 100_000


class ContainedAgent(Agent):
    """An agent whose kernel is the host's.

    Args:
        connect: Makes a connection to it.
        group: The container's control groups.
    """

    def __init__(self, connect: Callable[[], socket.socket], group: Group) -> None:
        super().__init__(connect)
        self._group = group

    def stats(self) -> GuestStats:
        """How the container is doing: memory and processors are those that it may use."""
        return dataclasses.replace(super().stats(), **self._memory(), **self._processors())

    def _memory(self) -> dict[str, int]:
        place = self._group.directory("memory")
        if place is None:
            return {}
        limit = files.read_integer(f"{place}/memory.limit_in_bytes") or files.read_integer(
            f"{place}/memory.max"
        )
        used = files.read_integer(f"{place}/memory.usage_in_bytes") or files.read_integer(
            f"{place}/memory.current"
        )
        if not limit:
            return {}
        return {"memory_total_bytes": limit, "memory_available_bytes": max(0, limit - used)}

    def _processors(self) -> dict[str, int]:
        place = self._group.directory("cpu")
        if place is None:
            return {}
        quota = files.read_integer(f"{place}/cpu.cfs_quota_us")
        if not quota:
            word = files.read(f"{place}/cpu.max").partition(" ")[0]
            quota = int(word) if word.isdigit() else 0
        if not quota:
            return {}
        return {"cpus": max(1, quota // _PERIOD_US)}

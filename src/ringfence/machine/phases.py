"""How long each part of a start took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Phases"]


class Phases:
    """A list of named times that grows while a machine starts.

    Args:
        on_change: Called with the name of each phase as it begins, to show it.
    """

    def __init__(self, on_change: Callable[[str], None] | None = None) -> None:
        self._on_change = on_change
        self._times: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Times the block as ``name``; a name that comes again is added to."""
        if self._on_change is not None:
            self._on_change(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds to a phase's time."""
        self._times[name] = self._times.get(name, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Each phase's time in seconds, in the order of their beginnings' ends."""
        return dict(self._times)

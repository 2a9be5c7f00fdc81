"""Mode ``nat``: outside by the host's address, and each other. Needs root."""

from __future__ import annotations

from ringfence.network.firewall import Passage
from ringfence.network.kernel import KernelMode

__all__ = ["check", "down", "join", "settle"]

_MODE = KernelMode("nat", Passage(outside=True, inside=False, host=False, translate=True))

check = _MODE.check
join = _MODE.join
settle = _MODE.settle
down = _MODE.down

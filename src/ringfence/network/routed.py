"""Mode ``routed``: outside by routes, untranslated; other hosts need a route to the subnet. Needs root."""

from __future__ import annotations

from ringfence.network.firewall import Passage
from ringfence.network.kernel import KernelMode

__all__ = ["check", "down", "join", "settle"]

_MODE = KernelMode("routed", Passage(outside=True, inside=True, host=False, translate=False))

check = _MODE.check
join = _MODE.join
settle = _MODE.settle
down = _MODE.down

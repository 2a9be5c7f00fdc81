"""Mode ``host-only``: the host and each other. Needs root."""

from __future__ import annotations

from ringfence.network.firewall import Passage
from ringfence.network.kernel import KernelMode

__all__ = ["check", "down", "join", "settle"]

_MODE = KernelMode("host-only", Passage(outside=False, inside=False, host=True, translate=False))

check = _MODE.check
join = _MODE.join
settle = _MODE.settle
down = _MODE.down

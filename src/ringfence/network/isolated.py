"""Mode ``isolated``: machines reach each other and nothing else, not even the host. No root.

The switch is a gateway without a way outside; it also tells addresses (DHCP) and names.
"""

from __future__ import annotations

from ringfence.network.shared import check, down, join, settle

__all__ = ["check", "down", "join", "settle"]

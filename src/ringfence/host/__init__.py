"""What this host can do, as measured, and why not."""

from __future__ import annotations

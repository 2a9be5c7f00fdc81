"""Reports of bugs in an engine: the guest's state as it was, kept for whoever mends it."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING

from ringfence import _paths

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["save"]

# A machine that fails at every start leaves no more than these.
_KEPT = 20


def save(machine: str, why: str, state: str) -> Path | None:
    """Keeps a report and returns its place; ``None`` when it can't be written.

    It is for this user alone: it may hold the guest's data.
    """
    folder = _paths.state_dir() / "reports"
    path = folder / f"{machine}-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09}.txt"
    head = f"{why}\nringfence {metadata.version('ringfence')}, {platform.platform()}\n\n"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(head + state)
    except OSError:
        # The failure itself is what matters.
        return None
    for old in sorted(folder.glob("*.txt"), key=_written)[:-_KEPT]:
        with suppress(OSError):
            old.unlink()
    return path


def _written(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0

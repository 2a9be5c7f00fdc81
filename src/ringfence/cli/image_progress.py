"""A bar for each layer that comes or goes; only on a terminal."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

from ringfence.cli import output

if TYPE_CHECKING:
    from ringfence.image.references import Digest
    from ringfence.image.transfer import Progress

__all__ = ["Bars"]

_STEP_S = 0.08
_WIDTH = 30
_MAX_LINES = 20


class Bars:
    """Draws the state of each blob; a context manager.

    Args:
        quiet: Draw nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._blobs: dict[Digest, Progress] = {}
        self._began = time.monotonic()
        self._drawn_at = 0.0
        self._lines = 0

    def __call__(self, progress: Progress) -> None:
        """Take in a blob's state; from any thread."""
        with self._lock:
            self._blobs[progress.digest] = progress
            now = time.monotonic()
            if self._shown and now - self._drawn_at >= _STEP_S:
                self._drawn_at = now
                self._draw()

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns
        lines = [self._line(blob)[: width - 1] for blob in self._blobs.values()][-_MAX_LINES:]
        up = f"\033[{self._lines}A" if self._lines else ""
        sys.stderr.write(up + "".join(f"\033[K{line}\n" for line in lines))
        sys.stderr.flush()
        self._lines = len(lines)

    @staticmethod
    def _line(blob: Progress) -> str:
        share = blob.done / blob.total if blob.total else 1.0
        full = int(share * _WIDTH)
        bar = "█" * full + "·" * (_WIDTH - full)
        state = blob.note or f"{output.size(blob.done)} of {output.size(blob.total)}"
        return f"{blob.digest.short}  {bar}  {state}"

    def summary(self) -> str:
        """What was moved, in how long."""
        moved = sum(blob.done for blob in self._blobs.values() if not blob.note)
        kept = sum(1 for blob in self._blobs.values() if blob.note)
        passed = time.monotonic() - self._began
        rest = f", {kept} blobs there already" if kept else ""
        return f"{output.size(moved)} in {passed:.1f} s{rest}"

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Draw the last state."""
        if self._shown and self._blobs:
            with self._lock:
                self._draw()

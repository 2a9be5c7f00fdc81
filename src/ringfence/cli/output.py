"""What the command line prints: tables, JSON, times, and a spinner for what takes long."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

__all__ = ["Spinner", "add_format", "ago", "print_json", "print_table", "size", "table"]

_SPINNER_AFTER_S = 0.5
_SPINNER_STEP_S = 0.1
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def add_format(parser: argparse.ArgumentParser) -> None:
    """Adds ``--format table|json``."""
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="how to print (table)"
    )


def print_json(value: object) -> None:
    """Prints a value as JSON."""
    print(json.dumps(value, indent=2, default=str))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, three spaces between."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    print(table(heads, rows))


def size(count: float) -> str:
    """Bytes as a person reads them: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def ago(since_s: float) -> str:
    """How long ago a time was, roughly."""
    passed = max(0.0, time.time() - since_s)
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if passed >= length:
            count = int(passed // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    count = int(passed)
    return f"{count} second{'s' if count != 1 else ''} ago"


def print_timing(seconds: Mapping[str, float]) -> None:
    """Prints how long each phase took, on standard error."""
    width = max(map(len, seconds), default=0)
    for name, value in seconds.items():
        print(f"  {name:<{width}}  {value * 1000:9.1f} ms", file=sys.stderr)


class Spinner:
    """Shows what is going on once it takes over half a second; only on a terminal.

    A context manager; the line is cleared when it is left.

    Args:
        text: What is going on.
        quiet: Show nothing.
    """

    def __init__(self, text: str = "", *, quiet: bool = False) -> None:
        self._text = text
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._shown = not quiet and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Something else is going on now."""
        with self._lock:
            self._text = text

    def __enter__(self) -> Self:
        """Begins to wait for half a second."""
        if self._shown:
            self._thread = threading.Thread(target=self._spin, daemon=True)
            self._thread.start()
        return self

    def _spin(self) -> None:
        if self._done.wait(_SPINNER_AFTER_S):
            return
        step = 0
        while not self._done.wait(_SPINNER_STEP_S):
            with self._lock:
                text = self._text
            sys.stderr.write(f"\r\033[K{_FRAMES[step % len(_FRAMES)]} {text}")
            sys.stderr.flush()
            step += 1
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()

    def stop(self) -> None:
        """Clears the line; may be called again."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __exit__(self, *_: object) -> None:
        """Clears the line."""
        self.stop()

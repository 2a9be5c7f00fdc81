"""``ringfence logs``: what a machine's command wrote in the background."""

from __future__ import annotations

import datetime as dt
import os
import sys
from typing import TYPE_CHECKING

from ringfence.machine import logs, state

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from ringfence.machine.logs import Chunk
    from ringfence.machine.state import Entry


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    parser.add_argument("-t", "--timestamps", action="store_true", help="when each line came")
    parser.add_argument("-n", "--tail", type=int, metavar="N", help="the last N lines only")
    parser.add_argument(
        "--console", action="store_true", help="what its kernel and VM process said instead"
    )
    parser.add_argument("machine", metavar="MACHINE", help="its name or ID")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    entry = state.find(args.machine)
    if args.console:
        _print_console(entry)
        return 0
    chunks = logs.read(entry.log)
    if args.tail is not None:
        chunks = _last_lines(chunks, args.tail)
    if not args.follow:
        _print(chunks, timestamps=args.timestamps)
        return 0
    seen = max((chunk.time_ns for chunk in chunks), default=0)
    _print(chunks, timestamps=args.timestamps)
    coming = logs.follow(entry.log, lambda: not entry.is_held())
    later = (chunk for chunk in coming if chunk.time_ns > seen)
    _print(later, timestamps=args.timestamps)
    return 0


def _print(chunks: Iterable[Chunk], *, timestamps: bool) -> None:
    for chunk in chunks:
        data = _stamped(chunk) if timestamps else chunk.data
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(chunk.stream, rest) :]


def _stamped(chunk: Chunk) -> bytes:
    moment = dt.datetime.fromtimestamp(chunk.time_ns / 1e9, tz=dt.UTC)
    stamp = moment.isoformat(timespec="milliseconds").encode()
    return b"".join(stamp + b" " + line for line in chunk.data.splitlines(keepends=True))


def _last_lines(chunks: list[Chunk], count: int) -> list[Chunk]:
    found: list[Chunk] = []
    left = count
    for chunk in reversed(chunks):
        if left <= 0:
            break
        lines = chunk.data.splitlines(keepends=True)
        kept = lines[-left:]
        left -= len(kept)
        found.append(logs.Chunk(stream=chunk.stream, time_ns=chunk.time_ns, data=b"".join(kept)))
    return found[::-1]


def _print_console(entry: Entry) -> None:
    for path in (entry.vm_log, entry.console):
        if path.exists() and (text := path.read_text(errors="replace")):
            sys.stdout.write(text)

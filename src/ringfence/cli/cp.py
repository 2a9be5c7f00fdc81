"""``ringfence cp``: files between a machine and the host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.errors import ConfigError, NotFoundError
from ringfence.machine.attached import AttachedMachine

if TYPE_CHECKING:
    import argparse

_CHUNK = 1 << 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.epilog = "One of the two is in a machine: MACHINE:PATH. `-` is a tar stream."
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("source", metavar="SOURCE", help="PATH or MACHINE:PATH")
    parser.add_argument("target", metavar="TARGET", help="PATH or MACHINE:PATH")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    source, target = _split(args.source), _split(args.target)
    if (source[0] is None) == (target[0] is None):
        message = "one of the two paths must be in a machine, and one on the host"
        raise ConfigError(message, hint="write a path in a machine as MACHINE:/PATH")
    with output.Spinner(f"copying {args.source} to {args.target}", quiet=args.quiet):
        if target[0] is not None:
            _copy_in(source[1], target[0], target[1])
        elif source[0] is not None:
            _copy_out(source[0], source[1], target[1])
    return 0


def _split(text: str) -> tuple[str | None, str]:
    """The machine, if any, and the path; a path with a colon is written ``./a:b``."""
    machine, colon, path = text.partition(":")
    if not colon or not machine or "/" in machine:
        return None, text
    return machine, path or "/"


def _copy_in(source: str, machine_name: str, target: str) -> None:
    with AttachedMachine(machine_name) as machine:
        if source == "-":
            chunks = iter(lambda: sys.stdin.buffer.read(_CHUNK), b"")
            machine.files.tar_in(target, chunks)
            return
        path = Path(source)
        if not path.exists():
            message = f"there is no file {path}"
            raise NotFoundError(message)
        machine.files.copy_in(path, target)


def _copy_out(machine_name: str, source: str, target: str) -> None:
    with AttachedMachine(machine_name) as machine:
        if target == "-":
            for chunk in machine.files.tar_out(source):
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            return
        machine.files.copy_out(source, Path(target))

"""``ringfence inspect``: what machines are, as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.errors import RingfenceError
from ringfence.machine.attached import AttachedMachine

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("machines", nargs="+", metavar="MACHINE", help="names or IDs")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    output.print_json([_inspect(name) for name in args.machines])
    return 0


def _inspect(name: str) -> dict[str, object]:
    machine = AttachedMachine(name)
    record = machine.entry.record
    found: dict[str, object] = dict(dataclasses.asdict(record))
    found["env"] = dict(record.env)
    found["folder"] = str(machine.entry.path)
    if record.status in ("running", "paused"):
        try:
            found["vm"] = machine.ask("inspect")
        except RingfenceError as error:
            found["vm"] = {"error": error.message}
    return found

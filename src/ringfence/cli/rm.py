"""``ringfence rm``: ended machines and their logs are forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.cli.each import add_machines, for_each
from ringfence.errors import StateError

if TYPE_CHECKING:
    import argparse

    from ringfence.machine.attached import AttachedMachine


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("-f", "--force", action="store_true", help="end those that run, too")
    add_machines(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    return for_each(args.machines, lambda machine: _remove(machine, force=args.force))


def _remove(machine: AttachedMachine, *, force: bool) -> None:
    if machine.entry.is_held():
        if not force:
            message = f"the machine {machine.name} is running"
            raise StateError(message, hint=f"ringfence rm -f {machine.name}")
        machine.kill()
    machine.entry.remove()

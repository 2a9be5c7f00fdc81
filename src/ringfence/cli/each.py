"""What verbs have in common that do one thing with each of several machines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ringfence.errors import RingfenceError
from ringfence.machine.attached import AttachedMachine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

__all__ = ["add_machines", "for_each"]


def add_machines(parser: argparse.ArgumentParser) -> None:
    """Adds the machines' names."""
    parser.add_argument("machines", nargs="+", metavar="MACHINE", help="names or IDs")


def for_each(names: Sequence[str], act: Callable[[AttachedMachine], None]) -> int:
    """Does it with each machine and prints its name; goes on when one fails, and says so."""
    status = 0
    for name in names:
        try:
            with AttachedMachine(name) as machine:
                act(machine)
        except RingfenceError as error:
            print(f"ringfence: {error}", file=sys.stderr)
            status = 1
        else:
            print(name)
    return status

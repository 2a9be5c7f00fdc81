"""``ringfence stop``: machines end in good order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.cli.each import add_machines, for_each

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "-t", "--time", type=float, default=10.0, metavar="S", help="seconds until by force (10)"
    )
    add_machines(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    return for_each(args.machines, lambda machine: machine.stop(args.time))

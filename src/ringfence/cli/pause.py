"""``ringfence pause``: a machine stops where it is, its memory stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.cli.each import add_machines, for_each

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_machines(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    return for_each(args.machines, lambda machine: machine.pause())

"""``ringfence ps``: all machines, as they are now."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.machine import state

if TYPE_CHECKING:
    import argparse

    from ringfence.machine.state import Record

_COMMAND_WIDTH = 30


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("-a", "--all", action="store_true", help="ended ones too")
    parser.add_argument("-q", "--quiet", action="store_true", help="IDs only")
    output.add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    records = [entry.record for entry in state.list_machines()]
    if not args.all:
        records = [record for record in records if record.status != "exited"]
    if args.quiet:
        for record in records:
            print(record.id)
    elif args.format == "json":
        output.print_json(
            [{**dataclasses.asdict(record), "env": dict(record.env)} for record in records]
        )
    else:
        heads = ("ID", "NAME", "ENGINE", "ROOT", "COMMAND", "CREATED", "STATUS")
        output.print_table(heads, [_row(record) for record in records])
    return 0


def _row(record: Record) -> tuple[str, ...]:
    command = shlex.join(record.command)
    if len(command) > _COMMAND_WIDTH:
        command = command[: _COMMAND_WIDTH - 1] + "…"
    return (
        record.id,
        record.name,
        record.engine,
        record.root,
        command,
        output.ago(record.created_s),
        status_words(record),
    )


def status_words(record: Record) -> str:
    """A machine's state, with how its command ended."""
    if record.status != "exited":
        return record.status
    if record.exit_code is not None:
        return f"exited ({record.exit_code})"
    return "exited (lost)" if record.error else "exited"

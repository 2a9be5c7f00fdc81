"""``ringfence run``: a command in a new machine, which is gone when the command has ended."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ringfence.cli import output, session
from ringfence.cli.machine_options import add_machine_options, add_process_options, machine_spec
from ringfence.machine.machine import Machine
from ringfence.machine.phases import Phases

if TYPE_CHECKING:
    from ringfence.machine.spec import MachineSpec

_EXAMPLES = """\
examples:
  ringfence run -- uname -a
  ringfence run --here -- python3 untrusted.py
  ringfence run --mount ~/data:/data:ro -m 2G --vcpus 2 -- make -C /data
  ringfence run -d --name db -- sleep infinity
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.usage = "ringfence run [OPTIONS] [--] COMMAND [ARGUMENT...]"
    parser.epilog = _EXAMPLES
    parser.formatter_class = _Formatter
    parser.add_argument(
        "-d", "--detach", action="store_true", help="run it in the background and print its name"
    )
    parser.add_argument(
        "--rm", action="store_true", help="forget it when it ends (as unnamed ones are)"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no progress; with -d print the ID"
    )
    parser.add_argument("--timing", action="store_true", help="print how long each phase took")
    add_machine_options(parser)
    add_process_options(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    command = command_of(args.command)
    spec = machine_spec(args)
    if args.detach:
        from ringfence.cli import detach  # noqa: PLC0415 - only in the background

        return detach.run_detached(spec, command, keep=not args.rm, quiet=args.quiet)
    return _run_here(spec, command, args)


def command_of(words: list[str]) -> tuple[str, ...]:
    """The command without the ``--`` before it."""
    return tuple(words[1:] if words[:1] == ["--"] else words)


def _run_here(spec: MachineSpec, command: tuple[str, ...], args: argparse.Namespace) -> int:
    terminal = session.wants_terminal(args.tty)
    keep = bool(spec.name) and not args.rm
    with output.Spinner(quiet=args.quiet) as spinner:
        phases = Phases(on_change=lambda phase: spinner.say(f"starting a machine: {phase}"))
        machine = Machine(spec, command=command, keep=keep, phases=phases)
        machine.start()
    command = machine.command or ("/bin/sh",)
    code: int | None = None
    try:
        with phases.measure("command"):
            env = {"TERM": os.environ["TERM"]} if terminal and "TERM" in os.environ else {}
            size = session.terminal_size() if terminal else None
            with machine.popen(command, env=env, terminal=size) as process:
                code = session.attend(process, terminal=terminal)
    finally:
        with phases.measure("end"):
            machine.close(exit_code=code)
    if args.timing:
        print(f"engine {machine.engine} ({machine.engine_reason})", file=sys.stderr)
        output.print_timing(phases.seconds)
    return code

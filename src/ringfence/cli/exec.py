"""``ringfence exec``: a command in a running machine."""

from __future__ import annotations

import argparse
import os

from ringfence.cli import session
from ringfence.cli.machine_options import add_process_options, environment
from ringfence.cli.run import command_of
from ringfence.errors import ConfigError
from ringfence.machine.attached import AttachedMachine


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.usage = "ringfence exec [OPTIONS] MACHINE [--] COMMAND [ARGUMENT...]"
    parser.add_argument("--timeout", type=float, metavar="S", help="kill it after S seconds")
    add_process_options(parser)
    parser.add_argument("machine", metavar="MACHINE", help="its name or ID")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    command = command_of(args.command)
    if not command:
        message = "there is no command to run"
        raise ConfigError(message, hint=f"for a shell: ringfence exec {args.machine} sh")
    terminal = session.wants_terminal(args.tty)
    env = {"TERM": os.environ["TERM"]} if terminal and "TERM" in os.environ else {}
    with (
        AttachedMachine(args.machine) as machine,
        machine.popen(
            command,
            env={**env, **environment(args.env)},
            workdir=args.workdir,
            user=args.user,
            terminal=session.terminal_size() if terminal else None,
            timeout_s=args.timeout,
        ) as process,
    ):
        return session.attend(process, terminal=terminal)

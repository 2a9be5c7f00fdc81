"""The command ``ringfence``: one module a verb, imported when the verb is used.

A verb's module has ``configure(parser)``, which adds its arguments, and ``run(args) -> int``,
which returns the exit status. It is entered in :data:`ringfence.cli.verbs.VERBS`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["main"]

# Exit statuses, as docker and shells have them.
EXIT_OURS = 125
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    Args:
        argv: Its words without the program's name; the process's own when None.
    """
    from ringfence.cli import arguments  # noqa: PLC0415 - `import ringfence.cli` stays cheap
    from ringfence.errors import ConfigError, RingfenceError  # noqa: PLC0415

    words = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        return arguments.dispatch(words)
    except ConfigError as error:
        return _fail(error, EXIT_USAGE)
    except RingfenceError as error:
        return _fail(error, EXIT_OURS)
    except _Terminated as end:
        return 128 + end.number
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13


class _Terminated(KeyboardInterrupt):
    """We were asked to end: what was begun is undone on the way out, as for an interrupt."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise _Terminated(number)


def _fail(error: Exception, status: int) -> int:
    print(f"ringfence: {error}", file=sys.stderr)
    if os.environ.get("RINGFENCE_DEBUG"):
        import traceback  # noqa: PLC0415 - for whoever asks

        traceback.print_exception(error)
    return status

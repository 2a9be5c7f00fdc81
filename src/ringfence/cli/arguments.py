"""Reads the command line and hands it to the verb."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

from ringfence.cli.verbs import GROUPS, VERBS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Parser", "dispatch", "parser_of"]


class _VerbModule(Protocol):
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, and where help is."""

    def error(self, message: str) -> NoReturn:
        """Prints the fault and ends with status 2."""
        self.exit(2, f"{self.prog}: {message}\n  hint: {self.prog} --help\n")

    def option_strings(self) -> list[str]:
        """All options, as they are written."""
        return sorted(self._option_string_actions)


class _HelpFormatter(argparse.HelpFormatter):
    """Wide enough to keep an option and its meaning on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def parser_of(verb: str) -> Parser:
    """The parser of a verb, with its module imported."""
    parser = Parser(
        prog=f"ringfence {verb}",
        description=_sentence(VERBS[verb].summary),
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser._optionals.title = "options"  # noqa: SLF001 - argparse has no other way
    _module(verb).configure(parser)
    return parser


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _module(verb: str) -> _VerbModule:
    return cast("_VerbModule", importlib.import_module(VERBS[verb].module))


def dispatch(words: Sequence[str]) -> int:
    """Runs the verb that the words name.

    Raises:
        RingfenceError: As the verb does.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[1] in VERBS:
            parser_of(words[1]).print_help()
            return 0
        print(_help())
        return 0
    verb, *rest = words
    if verb in ("-V", "--version", "version"):
        print(f"ringfence {_version()}")
        return 0
    if verb not in VERBS:
        return _unknown(verb)
    try:
        args = parser_of(verb).parse_args(rest)
    except SystemExit as done:
        return int(done.code or 0)
    return _module(verb).run(args)


def _unknown(verb: str) -> int:
    import difflib  # noqa: PLC0415 - only for mistakes

    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean: ringfence {near[0]}" if near else "ringfence --help lists the verbs"
    what = "option" if verb.startswith("-") else "verb"
    print(f"ringfence: there is no {what} {verb!r}\n  hint: {hint}", file=sys.stderr)
    return 2


def _help() -> str:
    lines = [
        "Run any program, container image or operating system in an isolated machine.",
        "",
        "usage: ringfence VERB [OPTIONS] ...",
    ]
    groups = [*GROUPS, *sorted({verb.group for verb in VERBS.values()} - set(GROUPS))]
    for group in groups:
        lines += ["", f"{group}:"]
        lines += [
            f"  {name:<12}{verb.summary}" for name, verb in VERBS.items() if verb.group == group
        ]
    lines += [
        "",
        "examples:",
        "  ringfence run -- uname -a                      a real VM around the host's own programs",
        "  ringfence run --here -- python3 untrusted.py   ... and this directory, read only",
        "  ringfence run -d --name web -- sleep 1000      in the background; then: ringfence exec web sh",
        "",
        "`ringfence VERB --help` says more.",
    ]
    return "\n".join(lines)


def _version() -> str:
    from importlib import metadata  # noqa: PLC0415 - slow, and seldom asked

    try:
        return metadata.version("ringfence")
    except metadata.PackageNotFoundError:
        return "(from a source checkout)"

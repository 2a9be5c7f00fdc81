"""``ringfence completion``: a script that completes verbs, options and machines' names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.cli.verbs import VERBS

if TYPE_CHECKING:
    import argparse

_TAKE_MACHINES = "exec logs inspect stats pause resume stop kill rm"

_BASH = """\
_ringfence() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
    elif [[ "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "$(ringfence completion options "$verb" 2>/dev/null)" -- "$word"))
    elif [[ " {machines} " == *" $verb "* ]]; then
        COMPREPLY=($(compgen -W "$(ringfence completion machines 2>/dev/null)" -- "$word"))
    else
        COMPREPLY=($(compgen -o default -- "$word"))
    fi
}}
complete -F _ringfence ringfence
"""
_ZSH = """\
autoload -U +X bashcompinit && bashcompinit
{bash}"""
_FISH = """\
complete -c ringfence -f -n __fish_use_subcommand -a "{verbs}"
complete -c ringfence -f -n "__fish_seen_subcommand_from {machines}" \\
    -a "(ringfence completion machines 2>/dev/null)"
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.usage = "ringfence completion bash|zsh|fish"
    parser.epilog = 'For bash: eval "$(ringfence completion bash)" in ~/.bashrc.'
    choices = ("bash", "zsh", "fish", "options", "machines")
    parser.add_argument("shell", choices=choices, metavar="SHELL", help="bash, zsh or fish")
    parser.add_argument("verb", nargs="?", default="", metavar="", help="")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    if args.shell == "machines":
        _print_machines()
    elif args.shell == "options":
        _print_options(args.verb)
    else:
        words = {"verbs": " ".join(VERBS), "machines": _TAKE_MACHINES}
        bash = _BASH.format(**words)
        script = {"bash": bash, "zsh": _ZSH.format(bash=bash), "fish": _FISH.format(**words)}
        print(script[args.shell], end="")
    return 0


def _print_machines() -> None:
    from ringfence.machine import state  # noqa: PLC0415 - not for the scripts

    print(" ".join(entry.record.name for entry in state.list_machines()))


def _print_options(verb: str) -> None:
    from ringfence.cli.arguments import parser_of  # noqa: PLC0415 - it imports us

    if verb in VERBS:
        print(" ".join(parser_of(verb).option_strings()))

"""The command line, read as runc reads it: ``--name value``, ``--name=value``, ``-n value``."""

from __future__ import annotations

from ringfence.errors import ConfigError

__all__ = ["Arguments", "parse"]


class Arguments:
    """Options by their long names, and what is left.

    Args:
        options: Each option's values, in order; a switch has an empty text.
        rest: Everything from the first argument that isn't an option.
    """

    __slots__ = ("options", "rest")

    def __init__(self, options: dict[str, list[str]], rest: list[str]) -> None:
        self.options = options
        self.rest = rest

    def __contains__(self, name: str) -> bool:
        """Whether an option was given."""
        return name in self.options

    def text(self, name: str, default: str = "") -> str:
        """An option's last value."""
        return self.options[name][-1] if name in self.options else default

    def texts(self, name: str) -> list[str]:
        """All values of an option."""
        return self.options.get(name, [])

    def integer(self, name: str, default: int = 0) -> int:
        """An option's value as a number.

        Raises:
            ConfigError: It isn't one.
        """
        text = self.text(name)
        if not text:
            return default
        try:
            return int(text, 0)
        except ValueError as error:
            message = f"--{name} takes a whole number, not {text!r}"
            raise ConfigError(message) from error

    def only_id(self) -> str:
        """The container's ID, which is all that is left.

        Raises:
            ConfigError: It is missing, or something else is there too.
        """
        if len(self.rest) != 1:
            message = f"exactly one container ID is wanted, not {self.rest}"
            raise ConfigError(message)
        return self.rest[0]


def parse(words: list[str], valued: str, switches: str, *, ordered: bool = False) -> Arguments:
    """Reads options wherever they are, as runc does.

    Args:
        words: The command line, without the command.
        valued: Options that take a value, separated by blanks; ``name/n`` has a short form.
        switches: Options that don't.
        ordered: All from the first word that is no option on belongs to another program.

    Raises:
        ConfigError: An option is unknown or its value is missing.
    """
    kinds: dict[str, tuple[str, bool]] = {}
    for names, takes in ((valued, True), (switches, False)):
        for name in names.split():
            long = name.partition("/")[0]
            for form in name.split("/"):
                kinds[form] = (long, takes)
    options: dict[str, list[str]] = {}
    rest: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        if not word.startswith("-") or word == "-":
            if ordered:
                break
            rest.append(word)
            index += 1
            continue
        index += 1
        if word == "--":
            break
        name, equals, value = word.lstrip("-").partition("=")
        if name not in kinds:
            message = f"there is no option {word!r}"
            raise ConfigError(message)
        long, takes = kinds[name]
        if takes and not equals:
            if index >= len(words):
                message = f"the option {word} needs a value"
                raise ConfigError(message)
            value = words[index]
            index += 1
        if not takes and equals and value in {"false", "0"}:
            continue
        options.setdefault(long, []).append(value)
    return Arguments(options, [*rest, *words[index:]])

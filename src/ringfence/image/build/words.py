"""Words of an instruction: variables expanded, quotes taken away, as a Dockerfile has it.

Source: Docker's Dockerfile reference, "Environment replacement".
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["expand", "key_values", "split_raw", "split_words"]

MAX_DEPTH = 16


class _Scanner:
    """Goes through a text once."""

    def __init__(self, text: str, variables: Mapping[str, str], escape: str, depth: int) -> None:
        self.text = text
        self.at = 0
        self._variables = variables
        self._escape = escape
        self._depth = depth

    def words(self, *, split: bool) -> list[str]:
        """The words; one, with its blanks, without `split`."""
        found: list[str] = []
        word: list[str] = []
        open_word = False
        while self.at < len(self.text):
            char = self.text[self.at]
            if split and char in " \t\n":
                self.at += 1
                if open_word:
                    found.append("".join(word))
                    word, open_word = [], False
                continue
            open_word = True
            word.append(self._piece(char))
        if open_word or not split:
            found.append("".join(word))
        return found

    def _piece(self, char: str) -> str:
        self.at += 1
        if char == self._escape:
            if self.at >= len(self.text):
                return char
            self.at += 1
            return self.text[self.at - 1]
        if char == "'":
            return self._single()
        if char == '"':
            return self._double()
        if char == "$":
            return self._variable()
        return char

    def _single(self) -> str:
        end = self.text.find("'", self.at)
        if end < 0:
            msg = f"a quote isn't closed: {self.text[:80]!r}"
            raise ConfigError(msg)
        found = self.text[self.at : end]
        self.at = end + 1
        return found

    def _double(self) -> str:
        parts: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == '"':
                return "".join(parts)
            if char == "$":
                parts.append(self._variable())
            elif char == self._escape and self.text[self.at : self.at + 1] in ('"', "$", char):
                parts.append(self.text[self.at])
                self.at += 1
            else:
                parts.append(char)
        msg = f"a quote isn't closed: {self.text[:80]!r}"
        raise ConfigError(msg)

    def _name(self) -> str:
        begin = self.at
        while self.at < len(self.text) and (
            self.text[self.at] == "_"
            or (self.text[self.at].isascii() and self.text[self.at].isalnum())
        ):
            self.at += 1
        return self.text[begin : self.at]

    def _variable(self) -> str:
        if self.text[self.at : self.at + 1] != "{":
            name = self._name()
            return self._variables.get(name, "") if name else "$"
        self.at += 1
        name = self._name()
        value = self._variables.get(name)
        end = self._closing()
        rest = self.text[self.at : end]
        self.at = end + 1
        if not name:
            msg = f"a variable has no name: {self.text[:80]!r}"
            raise ConfigError(msg)
        return self._modified(name, value, rest) if rest else value or ""

    def _closing(self) -> int:
        depth = 0
        at = self.at
        while at < len(self.text):
            if self.text.startswith("${", at):
                depth += 1
                at += 1
            elif self.text[at] == "}":
                if not depth:
                    return at
                depth -= 1
            at += 1
        msg = f"a variable isn't closed: {self.text[:80]!r}"
        raise ConfigError(msg)

    def _modified(self, name: str, value: str | None, rest: str) -> str:
        """``:-``, ``-``, ``:+``, ``+``, ``:?``, ``?``, ``#``, ``##``, ``%``, ``%%``."""
        strict = rest.startswith(":")
        kind = rest[strict : strict + 1]
        word = rest[strict + 1 :]
        there = bool(value) if strict else value is not None
        if kind == "-":
            return value or "" if there else self._word(word)
        if kind == "+":
            return self._word(word) if there else ""
        if kind == "?":
            if there:
                return value or ""
            msg = f"{name}: {self._word(word) or 'is not set'}"
            raise ConfigError(msg)
        if kind in ("#", "%") and not strict:
            greedy = word.startswith(kind)
            pattern = self._word(word[greedy:])
            return _without(value or "", pattern, start=kind == "#", greedy=greedy)
        msg = f"${{{name}{rest}}} is not known"
        raise ConfigError(msg)

    def _word(self, text: str) -> str:
        if self._depth >= MAX_DEPTH:
            msg = "variables are nested too deep"
            raise ConfigError(msg)
        scanner = _Scanner(text, self._variables, self._escape, self._depth + 1)
        return scanner.words(split=False)[0]


def _without(value: str, pattern: str, *, start: bool, greedy: bool) -> str:
    lengths = range(len(value) + 1)
    for length in reversed(lengths) if greedy else lengths:
        part = value[:length] if start else value[len(value) - length :]
        if fnmatchcase(part, pattern):
            return value[length:] if start else value[: len(value) - length]
    return value


def expand(text: str, variables: Mapping[str, str], escape: str = "\\") -> str:
    """The text with its variables replaced and its quotes taken away.

    >>> expand('"$A"/${B:-c}', {"A": "x"})
    'x/c'

    Raises:
        ConfigError: A quote or brace isn't closed.
    """
    return _Scanner(text, variables, escape, 0).words(split=False)[0]


def split_words(text: str, variables: Mapping[str, str], escape: str = "\\") -> list[str]:
    """The words of the text, expanded; an expanded variable isn't split again."""
    return _Scanner(text, variables, escape, 0).words(split=True)


def split_raw(text: str, escape: str = "\\") -> list[str]:
    """The words of the text as they stand: quotes and variables stay."""
    found: list[str] = []
    word, quote, at = "", "", 0
    while at < len(text):
        char = text[at]
        if char == escape and quote != "'" and at + 1 < len(text):
            word += text[at : at + 2]
            at += 2
            continue
        if char in "\"'" and quote in ("", char):
            quote = "" if quote else char
        if char in " \t" and not quote:
            if word:
                found.append(word)
            word = ""
        else:
            word += char
        at += 1
    return [*found, word] if word else found


def key_values(text: str, variables: Mapping[str, str], escape: str = "\\") -> dict[str, str]:
    """``A=1 B="two words"``, or the old form ``A the rest``.

    Raises:
        ConfigError: Neither form.
    """
    raw = split_raw(text, escape)
    if raw and "=" not in raw[0]:
        first = text.split(None, 1)
        if len(first) < 2:
            msg = f"{first[0]!r} has no value"
            raise ConfigError(msg, hint="write NAME=VALUE")
        return {expand(first[0], variables, escape): expand(first[1], variables, escape)}
    found: dict[str, str] = {}
    for word in split_words(text, variables, escape):
        name, equals, value = word.partition("=")
        if not equals or not name:
            msg = f"{word!r} is not NAME=VALUE"
            raise ConfigError(msg)
        found[name] = value
    return found

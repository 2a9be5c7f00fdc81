"""Dockerfiles read: lines, continuations, comments, directives, heredocs, flags.

Source: Docker's Dockerfile reference (syntax 1.7) and BuildKit's parser where they differ.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import NoReturn

from ringfence.errors import ConfigError

__all__ = ["Flag", "Heredoc", "Instruction", "parse_dockerfile"]

KNOWN = frozenset(
    {
        "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL",
        "MAINTAINER", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
    },
)  # fmt: skip
_HEREDOCS = frozenset({"RUN", "COPY", "ADD"})
_DIRECTIVE = re.compile(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.+?)\s*$")
_HEREDOC = re.compile(r"""(?<![<\\])(\d*)<<(-?)(["']?)([A-Za-z_][A-Za-z0-9_.]*)\3""")
_FLAG = re.compile(r"--([a-z][a-z-]*)(?:=(\S*))?(?:\s+|$)")
MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Flag:
    """One ``--name=value`` before an instruction's arguments."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Heredoc:
    """Text given in place.

    Args:
        name: Its end mark, and the file's name where it stands for a file.
        text: The text.
        expand: Whether variables are expanded (its name wasn't quoted).
    """

    name: str
    text: str
    expand: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction.

    Args:
        name: In capitals.
        text: What follows the flags, continuations joined.
        flags: In order.
        heredocs: In order.
        line: Where it begins, from 1.
    """

    name: str
    text: str
    flags: tuple[Flag, ...] = ()
    heredocs: tuple[Heredoc, ...] = ()
    line: int = 0
    escape: str = field(default="\\", repr=False)

    def flag(self, name: str, default: str = "") -> str:
        """The last value of a flag."""
        values = [flag.value for flag in self.flags if flag.name == name]
        return values[-1] if values else default

    def all_flags(self, name: str) -> list[str]:
        """All values of a flag."""
        return [flag.value for flag in self.flags if flag.name == name]

    def allow_flags(self, *names: str) -> None:
        """Refuse other flags.

        Raises:
            ConfigError: There is another.
        """
        for flag in self.flags:
            if flag.name not in names:
                self.fail(f"{self.name} has no flag --{flag.name}")

    def json_form(self) -> list[str] | None:
        """The words of the JSON form; None for the other."""
        if not self.text.lstrip().startswith("["):
            return None
        try:
            words = json.loads(self.text)
        except ValueError:
            return None
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return list(words)
        return None

    def fail(self, why: str) -> NoReturn:
        """Refuse it.

        Raises:
            ConfigError: Always.
        """
        msg = f"Dockerfile line {self.line}: {why}"
        raise ConfigError(msg)

    def __str__(self) -> str:
        """As history shows it."""
        flags = "".join(f"--{f.name}={f.value} " for f in self.flags)
        texts = "".join(f"\n{h.text}{h.name}" for h in self.heredocs)
        return f"{self.name} {flags}{self.text}{texts}"


def parse_dockerfile(data: str) -> list[Instruction]:
    """Read a Dockerfile.

    Raises:
        ConfigError: It isn't one; the message has the line.
    """
    if len(data) > MAX_BYTES:
        msg = f"the Dockerfile is longer than {MAX_BYTES} bytes"
        raise ConfigError(msg)
    lines = data.removeprefix("\ufeff").splitlines()
    escape = _directives(lines).get("escape", "\\")
    if escape not in ("\\", "`"):
        msg = f"Dockerfile: the escape character can be \\ or `, not {escape!r}"
        raise ConfigError(msg)
    found: list[Instruction] = []
    at = 0
    while at < len(lines):
        begin = at
        text, at = _logical_line(lines, at, escape)
        if text.strip():
            instruction, at = _instruction(text.strip(), lines, begin, at, escape)
            found.append(instruction)
    if not found:
        msg = "the Dockerfile has no instructions"
        raise ConfigError(msg)
    return found


def _directives(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        match = _DIRECTIVE.fullmatch(line.strip())
        if match is None or match[1].lower() in found:
            break
        found[match[1].lower()] = match[2]
    return found


def _logical_line(lines: list[str], at: int, escape: str) -> tuple[str, int]:
    """Lines joined where they end with the escape character; comments and empty ones between."""
    parts: list[str] = []
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.lstrip().startswith("#") or (parts and not line.strip()):
            if parts:
                continue
            return "", at
        stripped = line.rstrip()
        if stripped.endswith(escape):
            parts.append(stripped[: -len(escape)])
            continue
        parts.append(line)
        break
    return "".join(parts), at


def _instruction(
    text: str,
    lines: list[str],
    begin: int,
    at: int,
    escape: str,
) -> tuple[Instruction, int]:
    name, *others = text.split(None, 1)
    rest = others[0] if others else ""
    name = name.upper()
    if name not in KNOWN:
        msg = f"Dockerfile line {begin + 1}: there is no instruction {name[:40]!r}"
        raise ConfigError(msg)
    rest = rest.strip()
    flags: list[Flag] = []
    if name != "ONBUILD":
        while (match := _FLAG.match(rest)) is not None:
            flags.append(Flag(match[1], match[2] if match[2] is not None else "true"))
            rest = rest[match.end() :]
    heredocs: list[Heredoc] = []
    if name in _HEREDOCS or (name == "ONBUILD" and rest.upper().startswith(("RUN", "COPY", "ADD"))):
        heredocs, at = _heredocs(rest, lines, begin, at)
    made = Instruction(
        name=name,
        text=rest,
        flags=tuple(flags),
        heredocs=tuple(heredocs),
        line=begin + 1,
        escape=escape,
    )
    if not rest:
        made.fail(f"{name} needs an argument")
    return made, at


def _heredocs(
    text: str,
    lines: list[str],
    begin: int,
    at: int,
) -> tuple[list[Heredoc], int]:
    found: list[Heredoc] = []
    for match in _HEREDOC.finditer(_unquoted(text)):
        strip, quote, name = match[2] == "-", match[3], match[4]
        body: list[str] = []
        while True:
            if at >= len(lines):
                msg = f"Dockerfile line {begin + 1}: the heredoc {name} has no end"
                raise ConfigError(msg)
            line = lines[at].lstrip("\t") if strip else lines[at]
            at += 1
            if line == name:
                break
            body.append(line + "\n")
        found.append(Heredoc(name, "".join(body), not quote))
    return found, at


def _unquoted(text: str) -> str:
    """The text with what is quoted blanked out, but for quoted heredoc names."""
    return re.sub(r"""(?<!<<)(?<!<<-)(["'])(?:\\.|(?!\1).)*\1""", lambda m: " " * len(m[0]), text)

"""``.dockerignore``: which files of the context stay out.

Source: Docker's documentation of .dockerignore: Go's filepath.Match, ``**``, exceptions with ``!``,
the last match wins.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Ignore", "glob_regex"]


def glob_regex(pattern: str) -> str:
    """Go's filepath.Match with ``**``, as a regular expression for a path without ``/`` in front.

    Raises:
        ConfigError: A bracket isn't closed.
    """
    out: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            if pattern.startswith("*", at):
                at += 1
                if pattern.startswith("/", at):
                    at += 1
                    out.append("(?:.*/)?")
                else:
                    out.append(".*")
            else:
                out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[":
            end = pattern.find("]", at + (pattern[at : at + 1] == "^") + 1)
            if end < 0:
                msg = f"the pattern {pattern!r} has an open bracket"
                raise ConfigError(msg)
            inner = pattern[at:end].replace("\\", "\\\\").replace("[", "\\[")
            out.append(f"(?![/])[{inner}]")
            at = end + 1
        elif char == "\\" and at < len(pattern):
            out.append(re.escape(pattern[at]))
            at += 1
        else:
            out.append(re.escape(char))
    return "".join(out)


def _clean(pattern: str) -> str:
    parts: list[str] = []
    for part in pattern.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


class Ignore:
    """The patterns of one file.

    Args:
        lines: Its lines.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._rules: list[tuple[re.Pattern[str], bool]] = []
        self.has_exceptions = False
        for line in lines:
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            keep = text.startswith("!")
            pattern = _clean(text[keep:].strip())
            if not pattern:
                continue
            self.has_exceptions = self.has_exceptions or keep
            # A pattern that matches a directory covers what is in it.
            compiled = re.compile(glob_regex(pattern) + "(?:/.*)?", re.DOTALL)
            self._rules.append((compiled, keep))

    def ignores(self, path: str) -> bool:
        """Whether the path, relative to the context, stays out."""
        out = False
        for pattern, keep in self._rules:
            if out == keep and pattern.fullmatch(path):
                out = not keep
        return out

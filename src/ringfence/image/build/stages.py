"""Stages of a Dockerfile: what each begins with, and which are needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from ringfence.errors import ConfigError
from ringfence.image.build.words import expand, split_raw
from ringfence.image.platforms import Platform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ringfence.image.build.dockerfile import Instruction

__all__ = ["Stage", "arg_of", "platform_variables", "stages_of"]

PREDEFINED = frozenset(
    name
    for word in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (word, word.lower())
)
"""Variables that needn't be declared, and that don't count for the cache."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """One FROM and what follows it.

    Args:
        number: From 0.
        name: After AS, in lower case; empty without.
        origin: An image, an earlier stage's name, or ``scratch``.
        platform: Of the image; empty is the build's.
        steps: The instructions.
        line: Of the FROM.
    """

    number: int
    name: str
    origin: str
    platform: str = ""
    steps: list[Instruction] = field(default_factory=list)
    line: int = 0


def platform_variables(target: Platform) -> dict[str, str]:
    """TARGETPLATFORM and its kin."""
    found: dict[str, str] = {}
    for prefix, platform in (("TARGET", target), ("BUILD", Platform.host())):
        found[f"{prefix}PLATFORM"] = str(platform)
        found[f"{prefix}OS"] = platform.os
        found[f"{prefix}ARCH"] = platform.architecture
        found[f"{prefix}VARIANT"] = platform.variant
    return found


def arg_of(
    instruction: Instruction,
    variables: Mapping[str, str],
) -> list[tuple[str, str | None]]:
    """The names that an ARG declares, with their defaults."""
    found: list[tuple[str, str | None]] = []
    for word in split_raw(instruction.text, instruction.escape):
        name, equals, value = word.partition("=")
        expanded = expand(value, variables, instruction.escape) if equals else None
        found.append((name, expanded))
    return found


def stages_of(
    instructions: Sequence[Instruction],
    build_args: Mapping[str, str],
    target: Platform,
) -> tuple[list[Stage], dict[str, str]]:
    """Divide a Dockerfile into stages.

    Returns:
        The stages, and the variables declared before the first.

    Raises:
        ConfigError: Something else than ARG stands before the first FROM, or a name comes twice.
    """
    variables = platform_variables(target)
    globals_: dict[str, str] = {}
    found: list[Stage] = []
    for instruction in instructions:
        if instruction.name == "FROM":
            stage = _from(instruction, len(found), {**variables, **globals_})
            if stage.name and any(other.name == stage.name for other in found):
                instruction.fail(f"there are two stages {stage.name!r}")
            found.append(stage)
        elif found:
            found[-1].steps.append(instruction)
        elif instruction.name == "ARG":
            for name, default in arg_of(instruction, {**variables, **globals_}):
                value = build_args.get(name, default)
                if value is not None:
                    globals_[name] = value
        else:
            instruction.fail(f"{instruction.name} stands before the first FROM")
    if not found:
        _no_from()
    return found, globals_


def _no_from() -> NoReturn:
    msg = "the Dockerfile has no FROM"
    raise ConfigError(msg)


def _from(instruction: Instruction, number: int, variables: Mapping[str, str]) -> Stage:
    instruction.allow_flags("platform")
    words = instruction.text.split()
    if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
        instruction.fail("FROM takes an image, and AS with a name")
    origin = expand(words[0], variables, instruction.escape)
    if not origin:
        instruction.fail(f"{words[0]!r} stands for no image: a variable is empty")
    return Stage(
        number=number,
        name=words[2].lower() if len(words) == 3 else "",
        origin=origin,
        platform=expand(instruction.flag("platform"), variables, instruction.escape),
        line=instruction.line,
    )

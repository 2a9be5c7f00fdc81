"""Instructions that change the configuration alone.

Source: Docker's Dockerfile reference.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ringfence.image.build.words import expand, key_values, split_words
from ringfence.image.jsonio import Json

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.image.build.dockerfile import Instruction
    from ringfence.image.build.state import StageState

__all__ = ["CONFIGURE", "DEFAULT_SHELL", "command_words", "workdir_of"]

DEFAULT_SHELL = ("/bin/sh", "-c")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s|us|ns)")
_NANOSECONDS = {
    "h": 3_600_000_000_000, "m": 60_000_000_000, "s": 1_000_000_000, "ms": 1_000_000,
    "us": 1_000, "ns": 1,
}  # fmt: skip
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?")


def command_words(instruction: Instruction, state: StageState) -> tuple[str, ...]:
    """The command of the JSON form, or of the other by the shell."""
    words = instruction.json_form()
    if words is not None:
        return tuple(words)
    return (*(state.config.shell or DEFAULT_SHELL), instruction.text)


def _expanded(instruction: Instruction, state: StageState) -> str:
    return expand(instruction.text, state.variables, instruction.escape)


def _words(instruction: Instruction, state: StageState) -> list[str]:
    json_words = instruction.json_form()
    if json_words is not None:
        return [expand(word, state.variables, instruction.escape) for word in json_words]
    return split_words(instruction.text, state.variables, instruction.escape)


def _env(instruction: Instruction, state: StageState) -> None:
    state.set_env(key_values(instruction.text, state.variables, instruction.escape))


def _label(instruction: Instruction, state: StageState) -> None:
    new = key_values(instruction.text, state.variables, instruction.escape)
    state.config = replace(state.config, labels={**state.config.labels, **new})


def _maintainer(instruction: Instruction, state: StageState) -> None:
    state.config = replace(state.config, author=instruction.text)


def _cmd(instruction: Instruction, state: StageState) -> None:
    state.config = replace(state.config, cmd=command_words(instruction, state))
    state.cmd_inherited = False


def _entrypoint(instruction: Instruction, state: StageState) -> None:
    cmd = () if state.cmd_inherited else state.config.cmd
    entry = command_words(instruction, state)
    state.config = replace(state.config, entrypoint=entry, cmd=cmd)


def _shell(instruction: Instruction, state: StageState) -> None:
    words = instruction.json_form()
    if not words:
        instruction.fail("SHELL takes the JSON form")
    state.config = replace(state.config, shell=tuple(words or ()))


def _user(instruction: Instruction, state: StageState) -> None:
    state.config = replace(state.config, user=_expanded(instruction, state))


def workdir_of(instruction: Instruction, state: StageState) -> str:
    """The directory that a WORKDIR means, from the one before."""
    path = PurePosixPath(state.config.workdir or "/") / _expanded(instruction, state)
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            if len(parts) > 1:
                parts.pop()
        else:
            parts.append(part)
    return str(PurePosixPath(*parts))


def _expose(instruction: Instruction, state: StageState) -> None:
    ports = list(state.config.exposed_ports)
    for word in _words(instruction, state):
        match = _PORT.fullmatch(word.lower())
        if match is None:
            instruction.fail(f"{word!r} is not a port")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 < first <= last <= 65535:
            instruction.fail(f"{word!r} is not a port")
        ports += [f"{port}/{match[3] or 'tcp'}" for port in range(first, last + 1)]
    state.config = replace(state.config, exposed_ports=tuple(dict.fromkeys(ports)))


def _volume(instruction: Instruction, state: StageState) -> None:
    volumes = (*state.config.volumes, *_words(instruction, state))
    state.config = replace(state.config, volumes=tuple(dict.fromkeys(volumes)))


def _stop_signal(instruction: Instruction, state: StageState) -> None:
    state.config = replace(state.config, stop_signal=_expanded(instruction, state))


def _healthcheck(instruction: Instruction, state: StageState) -> None:
    instruction.allow_flags("interval", "timeout", "start-period", "start-interval", "retries")
    kind, _, rest = instruction.text.partition(" ")
    if kind.upper() == "NONE":
        check: dict[str, Json] = {"Test": ["NONE"]}
    elif kind.upper() == "CMD" and rest.strip():
        inner = replace(instruction, text=rest.strip())
        words = inner.json_form()
        test = ["CMD", *words] if words is not None else ["CMD-SHELL", rest.strip()]
        check = {"Test": list[Json](test)}
    else:
        instruction.fail("HEALTHCHECK takes NONE or CMD and a command")
    names = {
        "interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod",
        "start-interval": "StartInterval",
    }  # fmt: skip
    for flag in instruction.flags:
        if flag.name == "retries":
            check["Retries"] = int(flag.value) if flag.value.isdigit() else 0
        else:
            check[names[flag.name]] = _duration(flag.value, instruction)
    state.config = replace(state.config, healthcheck=check)


def _duration(text: str, instruction: Instruction) -> int:
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text or not parts:
        instruction.fail(f"{text!r} is not a duration")
    return int(sum(float(number) * _NANOSECONDS[unit] for number, unit in parts))


def _on_build(instruction: Instruction, state: StageState) -> None:
    name = instruction.text.split(None, 1)[0].upper()
    if name in ("ONBUILD", "FROM", "MAINTAINER"):
        instruction.fail(f"ONBUILD can't hold {name}")
    text = instruction.text + "".join(f"\n{h.text}{h.name}" for h in instruction.heredocs)
    state.config = replace(state.config, on_build=(*state.config.on_build, text))


CONFIGURE: dict[str, Callable[[Instruction, StageState], None]] = {
    "ENV": _env,
    "LABEL": _label,
    "MAINTAINER": _maintainer,
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "SHELL": _shell,
    "USER": _user,
    "EXPOSE": _expose,
    "VOLUME": _volume,
    "STOPSIGNAL": _stop_signal,
    "HEALTHCHECK": _healthcheck,
    "ONBUILD": _on_build,
}

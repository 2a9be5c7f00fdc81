"""A short-lived machine made to run code that isn't trusted."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Literal, Self, Unpack

from ringfence.errors import ConfigError
from ringfence.machine.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ringfence.machine.options import MachineOptions
    from ringfence.machine.result import Result

__all__ = ["Language", "Sandbox"]

Language = Literal["python", "sh", "bash", "node", "perl", "ruby"]

# How each language's program reads its source from an argument.
_RUNNERS: Mapping[str, tuple[str, ...]] = {
    "python": ("python3", "-c"),
    "sh": ("sh", "-c"),
    "bash": ("bash", "-c"),
    "node": ("node", "-e"),
    "perl": ("perl", "-e"),
    "ruby": ("ruby", "-e"),
}
# Above this a source goes to a file, not to an argument.
_MAX_ARGUMENT = 64 << 10

DEFAULT_MACHINE_S = 3600.0
DEFAULT_COMMAND_S = 300.0


class Sandbox(Machine):
    """A machine for code: no network, and a time limit on everything, unless said otherwise.

    Egress rules or published ports say otherwise: they give it the network ``user``.

    Args:
        **options: See :class:`ringfence.machine.options.MachineOptions`. The machine lives an hour,
            and each command five minutes, unless said otherwise.

    Example:
        >>> with Sandbox() as box:                                 # doctest: +SKIP
        ...     print(box.run_code("print(6 * 7)").stdout)
        42
    """

    def __init__(self, **options: Unpack[MachineOptions]) -> None:
        options.setdefault("timeout_s", DEFAULT_MACHINE_S)
        options.setdefault("command_timeout_s", DEFAULT_COMMAND_S)
        asks = {"ports", "allow", "deny", "dns", "hosts"} & options.keys()
        options.setdefault("network", "user" if asks else "none")
        super().__init__(None, **options)

    @classmethod
    def create(cls, **options: Unpack[MachineOptions]) -> Self:
        """A sandbox that was started already; close it when done."""
        return cls(**options).start()

    def run_code(
        self,
        source: str,
        *,
        language: Language = "python",
        arguments: Sequence[str] = (),
        timeout_s: float | None = None,
        check: bool = False,
    ) -> Result:
        """Runs a program given as text.

        Args:
            source: The program.
            language: What it is written in; its interpreter must be in the machine.
            arguments: What the program is given.
            timeout_s: When it is killed.
            check: Raise when its exit status isn't 0.

        Raises:
            ConfigError: The language isn't known.
            CommandError: ``check`` was asked, and the exit status isn't 0.
            GuestTimeout: It was killed because its time was up.
        """
        argv = self.command_for(source, language=language, arguments=arguments)
        return self.run(argv, timeout_s=timeout_s, check=check)

    def command_for(
        self, source: str, *, language: Language, arguments: Sequence[str] = ()
    ) -> list[str]:
        """The command that runs a program given as text, which is put into the machine if long.

        Args:
            source: The program.
            language: What it is written in.
            arguments: What the program is given.

        Raises:
            ConfigError: The language isn't known.
        """
        runner = _RUNNERS.get(language)
        if runner is None:
            message = f"there is no way known to run {language!r}"
            raise ConfigError(message, hint=f"choose one of {', '.join(_RUNNERS)}")
        if len(source.encode()) <= _MAX_ARGUMENT:
            # A shell's first argument after the source is its $0.
            name = (language,) if language in ("sh", "bash") else ()
            return [*runner, source, *name, *arguments]
        path = f"/tmp/ringfence-code-{secrets.token_hex(4)}"  # noqa: S108 - the guest's own
        self.files.write(path, source.encode())
        return [runner[0], path, *arguments]

"""Running commands in a machine: what one's own and an attached one have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Self

from ringfence.errors import AgentError, CommandError, ConfigError, GuestTimeout
from ringfence.guest.spec import ExecSpec
from ringfence.machine.process import Process
from ringfence.machine.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ringfence.errors import RingfenceError
    from ringfence.guest.agent import GuestStats
    from ringfence.guest.spec import Privileges, TerminalSize
    from ringfence.machine.driver import AgentLike, FilesLike
    from ringfence.machine.spec import MachineSpec

__all__ = ["CommandDefaults", "Commands"]

_NO_VARIABLES: Mapping[str, str] = {}
# The guest kills a command whose time is up; we wait a little longer for its word.
_GRACE_S = 10.0


class CommandDefaults:
    """What holds for each command unless said otherwise.

    Args:
        env: The environment.
        workdir: Where it runs.
        user: Who runs it.
        timeout_s: How long it may take.
    """

    def __init__(
        self,
        *,
        env: Mapping[str, str] = _NO_VARIABLES,
        workdir: str = "",
        user: str = "",
        timeout_s: float | None = None,
    ) -> None:
        self.env = dict(env)
        self.workdir = workdir
        self.user = user
        self.timeout_s = timeout_s

    @classmethod
    def of(cls, spec: MachineSpec) -> Self:
        """What a specification says of commands."""
        timeout_s = spec.timeouts.command_s
        return cls(env=spec.env, workdir=spec.workdir, user=spec.user, timeout_s=timeout_s)


class Commands(ABC):
    """A machine in which commands can be run."""

    _defaults: CommandDefaults

    @abstractmethod
    def _running_agent(self) -> AgentLike:
        """The agent of the running machine.

        Raises:
            StateError: It isn't running.
        """

    @abstractmethod
    def _why_gone(self) -> RingfenceError | None:
        """Why the machine has ended, if it has."""

    def _command_began(self) -> None:  # noqa: B027 - nothing need be done
        """A command runs from now on."""

    def _command_ended(self) -> None:  # noqa: B027 - likewise
        """It has ended."""

    @property
    def files(self) -> FilesLike:
        """The machine's files: read, write, list, stat, mkdir, remove, rename, copy_in, copy_out."""
        return self._running_agent().files

    def guest_stats(self) -> GuestStats:
        """How the machine is doing, as it sees it itself."""
        return self._running_agent().stats()

    def popen(  # noqa: PLR0913 - each can be said of a command
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] = _NO_VARIABLES,
        workdir: str = "",
        user: str = "",
        terminal: TerminalSize | None = None,
        stdin: bool = True,
        timeout_s: float | None = None,
        privileges: Privileges | None = None,
    ) -> Process:
        """Starts a command and returns at once.

        Args:
            argv: The program and its arguments.
            env: Added to the machine's environment.
            workdir: Where it runs; the machine's when empty.
            user: Who runs it; the machine's when empty.
            terminal: With it the command has a terminal of that size.
            stdin: Without it standard input is empty.
            timeout_s: When the guest kills it; the machine's command time when None.
            privileges: What it may do; what its user may when None.

        Raises:
            ConfigError: The command is no list of words.
            StateError: The machine isn't running.
        """
        if isinstance(argv, str):
            message = f"a command is a list of words, not the text {argv!r}"
            raise ConfigError(message, hint=f'for a shell: ["sh", "-c", {argv!r}]')
        defaults = self._defaults
        spec = ExecSpec(
            argv=tuple(argv),
            env={**defaults.env, **env},
            cwd=workdir or defaults.workdir or "/",
            user=user or defaults.user,
            terminal=terminal,
            stdin=stdin,
            timeout_s=timeout_s if timeout_s is not None else defaults.timeout_s,
            privileges=privileges,
        )
        agent = self._running_agent()
        self._command_began()
        try:
            process = agent.exec(spec)
        except BaseException as error:
            self._command_ended()
            if isinstance(error, OSError | AgentError) and (reason := self._why_gone()) is not None:
                raise reason from error
            raise
        return Process(process, spec.argv, self._why_gone, self._command_ended)

    def run(  # noqa: PLR0913 - likewise
        self,
        argv: Sequence[str],
        *,
        input: str | bytes = b"",  # noqa: A002 - as subprocess.run has it
        env: Mapping[str, str] = _NO_VARIABLES,
        workdir: str = "",
        user: str = "",
        timeout_s: float | None = None,
        check: bool = False,
        on_start: Callable[[Process], None] | None = None,
    ) -> Result:
        """Runs a command to its end.

        Args:
            argv: The program and its arguments.
            input: What it reads.
            env: Added to the machine's environment.
            workdir: Where it runs; the machine's when empty.
            user: Who runs it; the machine's when empty.
            timeout_s: When it is killed; the machine's command time when None.
            check: Raise when the exit status isn't 0.
            on_start: Is given the command as soon as it runs, to end it from elsewhere.

        Raises:
            CommandError: ``check`` was asked, and the exit status isn't 0.
            GuestTimeout: It was killed because its time was up.
            GuestCrash: The machine ended under it.
        """
        limit = timeout_s if timeout_s is not None else self._defaults.timeout_s
        data = input.encode() if isinstance(input, str) else input
        begin = time.perf_counter()
        with self.popen(
            argv, env=env, workdir=workdir, user=user, stdin=bool(data), timeout_s=limit
        ) as process:
            running = time.perf_counter()
            if on_start is not None:
                on_start(process)
            patience = None if limit is None else limit + _GRACE_S
            stdout, stderr = process.communicate(data, patience)
            code = process.wait(patience)
            end = time.perf_counter()
            if process.timed_out:
                message = f"{argv[0]} was killed: it ran longer than {limit:g} s"
                raise GuestTimeout(message)
            reason = process.message
        if check and code != 0:
            message = f"{' '.join(argv)!r} ended with status {code}"
            if reason or stderr:
                last = reason or stderr.decode(errors="replace").strip().rpartition("\n")[2]
                message = f"{message}: {last}"
            raise CommandError(message, exit_code=code, stdout=stdout, stderr=stderr)
        if reason:
            stderr += f"{reason}\n".encode()
        return Result(
            argv=tuple(argv),
            exit_code=code,
            stdout_bytes=stdout,
            stderr_bytes=stderr,
            timing={"start": running - begin, "run": end - running},
        )

    def make_workdir(self) -> None:
        """Makes the working directory when it is missing."""
        workdir = self._defaults.workdir
        if workdir and PurePosixPath(workdir).parts[1:]:
            self._running_agent().files.mkdir(workdir, parents=True)

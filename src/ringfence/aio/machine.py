"""Machines for asyncio: the same names as elsewhere, awaited."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self, Unpack

from ringfence.aio.parts import Files, Process, in_thread, pool
from ringfence.errors import GuestCrash
from ringfence.machine import machine as sync_machine
from ringfence.machine import sandbox as sync_sandbox

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from ringfence.guest.agent import GuestStats
    from ringfence.guest.spec import TerminalSize
    from ringfence.machine import process as sync_process
    from ringfence.machine.driver import Ending
    from ringfence.machine.options import MachineOptions
    from ringfence.machine.result import Result
    from ringfence.machine.sandbox import Language
    from ringfence.machine.spec import MachineSpec

__all__ = ["Machine", "Sandbox"]

_NO_VARIABLES: Mapping[str, str] = {}


class Machine:
    """An isolated machine. An async context manager: entering starts it, leaving destroys it.

    Args:
        spec: What it is; else say it by keywords.
        **options: See :class:`ringfence.machine.options.MachineOptions`.

    Raises:
        ConfigError: What is asked for isn't possible.
    """

    def __init__(self, spec: MachineSpec | None = None, **options: Unpack[MachineOptions]) -> None:
        self._machine = self._make(spec, options)

    @staticmethod
    def _make(spec: MachineSpec | None, options: MachineOptions) -> sync_machine.Machine:
        return sync_machine.Machine(spec, **options)

    @property
    def sync(self) -> sync_machine.Machine:
        """The machine behind it, for what isn't awaited."""
        return self._machine

    @property
    def name(self) -> str:
        """Its name."""
        return self._machine.name

    @property
    def id(self) -> str:
        """Its ID."""
        return self._machine.id

    @property
    def engine(self) -> str:
        """What runs it."""
        return self._machine.engine

    @property
    def kernel(self) -> str:
        """Its kernel's version."""
        return self._machine.kernel

    @property
    def timing(self) -> Mapping[str, float]:
        """How long each part of the start took, in seconds."""
        return self._machine.timing

    @property
    def files(self) -> Files:
        """The machine's files."""
        return Files(self._machine.files)

    async def start(self) -> Self:
        """Starts it and waits until it takes commands."""
        starting = asyncio.ensure_future(in_thread(self._machine.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread can't be cancelled: what it started is ended once it is there.
            starting.add_done_callback(lambda _: pool.submit(self._machine.close))
            raise
        return self

    async def popen(  # noqa: PLR0913 - each can be said of a command
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] = _NO_VARIABLES,
        workdir: str = "",
        user: str = "",
        terminal: TerminalSize | None = None,
        stdin: bool = True,
        timeout_s: float | None = None,
    ) -> Process:
        """Starts a command; see :meth:`ringfence.Machine.popen`."""
        process = await in_thread(
            self._machine.popen,
            argv,
            env=env,
            workdir=workdir,
            user=user,
            terminal=terminal,
            stdin=stdin,
            timeout_s=timeout_s,
        )
        return Process(process)

    async def run(  # noqa: PLR0913 - likewise
        self,
        argv: Sequence[str],
        *,
        input: str | bytes = b"",  # noqa: A002 - as subprocess.run has it
        env: Mapping[str, str] = _NO_VARIABLES,
        workdir: str = "",
        user: str = "",
        timeout_s: float | None = None,
        check: bool = False,
    ) -> Result:
        """Runs a command to its end; see :meth:`ringfence.Machine.run`.

        When the task is cancelled, the command is ended.
        """
        held: list[sync_process.Process] = []
        running = asyncio.ensure_future(
            in_thread(
                self._machine.run,
                argv,
                input=input,
                env=env,
                workdir=workdir,
                user=user,
                timeout_s=timeout_s,
                check=check,
                on_start=held.append,
            )
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            for process in held:
                await in_thread(process.close)
            running.add_done_callback(_look_at)
            raise

    async def guest_stats(self) -> GuestStats:
        """How the machine is doing, as it sees it itself."""
        return await in_thread(self._machine.guest_stats)

    async def stats(self, *, engine_counters: bool = False) -> Mapping[str, object]:
        """What it uses of the host."""
        return await in_thread(self._machine.stats, engine_counters=engine_counters)

    async def inspect(self) -> Mapping[str, object]:
        """What it is made of."""
        return await in_thread(self._machine.inspect)

    async def connect(
        self, network: str, *, ip: str | tuple[str, ...] = (), mac: str = ""
    ) -> Mapping[str, object]:
        """Gives it one more interface; see :meth:`ringfence.Machine.connect`."""
        return await in_thread(self._machine.connect, network, ip=ip, mac=mac)

    async def disconnect(self, network: str) -> None:
        """Takes its interface on a network away."""
        await in_thread(self._machine.disconnect, network)

    async def pause(self) -> None:
        """Stops it where it is."""
        await in_thread(self._machine.pause)

    async def resume(self) -> None:
        """Lets it go on."""
        await in_thread(self._machine.resume)

    async def balloon(self, target_mib: int) -> None:
        """Asks the guest to give memory back; see :meth:`ringfence.Machine.balloon`."""
        await in_thread(self._machine.balloon, target_mib)

    async def wait(self, timeout_s: float | None = None) -> Ending | None:
        """Waits until it ends; None when it still runs after that time."""
        return await in_thread(self._machine.wait, timeout_s)

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ends it in good order; by force after that time."""
        await in_thread(self._machine.stop, timeout_s)

    async def kill(self) -> None:
        """Ends it at once."""
        await in_thread(self._machine.kill)

    async def close(self) -> None:
        """Destroys it."""
        await asyncio.shield(in_thread(self._machine.close))

    async def __aenter__(self) -> Self:
        """Starts it."""
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Destroys it."""
        try:
            await self.close()
        except GuestCrash:
            # What went wrong before comes first.
            if error is None:
                raise


def _look_at(future: asyncio.Future[Result]) -> None:
    """Nobody waits for it any more, so its error is nobody's."""
    if not future.cancelled():
        future.exception()


class Sandbox(Machine):
    """A machine for code; see :class:`ringfence.Sandbox`.

    Args:
        **options: See :class:`ringfence.machine.options.MachineOptions`.
    """

    def __init__(self, **options: Unpack[MachineOptions]) -> None:
        super().__init__(None, **options)

    @staticmethod
    def _make(_spec: MachineSpec | None, options: MachineOptions) -> sync_machine.Machine:
        return sync_sandbox.Sandbox(**options)

    @classmethod
    async def create(cls, **options: Unpack[MachineOptions]) -> Self:
        """A sandbox that was started already; close it when done."""
        return await cls(**options).start()

    async def run_code(
        self,
        source: str,
        *,
        language: Language = "python",
        arguments: Sequence[str] = (),
        timeout_s: float | None = None,
        check: bool = False,
    ) -> Result:
        """Runs a program given as text; see :meth:`ringfence.Sandbox.run_code`."""
        argv = await in_thread(
            self._sandbox.command_for, source, language=language, arguments=arguments
        )
        return await self.run(argv, timeout_s=timeout_s, check=check)

    @property
    def _sandbox(self) -> sync_sandbox.Sandbox:
        assert isinstance(self._machine, sync_sandbox.Sandbox)  # noqa: S101 - made above
        return self._machine

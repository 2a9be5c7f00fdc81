"""A machine that another process holds."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from ringfence.errors import GuestCrash, RingfenceError, StateError
from ringfence.machine import control_server, engines, state
from ringfence.machine.commands import CommandDefaults, Commands
from ringfence.machine.driver import Place

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from ringfence.machine.control_server import Json
    from ringfence.machine.driver import AgentLike

__all__ = ["AttachedMachine"]

_STOP_GRACE_S = 10.0
_POLL_S = 0.02


class AttachedMachine(Commands):
    """A running machine by its name. A context manager: leaving it lets go, the machine goes on.

    Args:
        name: Its name, or what its ID begins with.

    Raises:
        NotFoundError: There is no such machine.
    """

    def __init__(self, name: str) -> None:
        self._entry = state.find(name)
        self._agent: AgentLike | None = None
        record = self._entry.record
        self._defaults = CommandDefaults(
            env=dict(record.env), workdir=record.workdir, user=record.user
        )

    @property
    def entry(self) -> state.Entry:
        """What is written of it."""
        return self._entry

    @property
    def name(self) -> str:
        """Its name."""
        return self._entry.record.name

    @property
    def id(self) -> str:
        """Its ID."""
        return self._entry.record.id

    def _running_agent(self) -> AgentLike:
        if self._agent is None:
            record = self._entry.record
            if record.status == "paused":
                message = f"the machine {record.name} is paused"
                raise StateError(message, hint=f"ringfence resume {record.name}")
            if record.status != "running":
                message = f"the machine {record.name} is not running"
                raise StateError(message, hint="ringfence ps -a shows how it ended")
            self._agent = engines.load_driver(record.engine).attach(Place.of(self._entry))
        return self._agent

    def _why_gone(self) -> RingfenceError | None:
        # Its holder's lock falls a moment after its sockets.
        deadline = time.monotonic() + 1.0
        while self._entry.is_held():
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        return GuestCrash(f"the machine {self.name} has ended")

    def ask(self, method: str, *, timeout_s: float | None = 30.0, **fields: object) -> Json:
        """Asks its holder.

        Raises:
            StateError: The machine isn't running.
            RingfenceError: The holder refuses.
        """
        path = self._entry.sockets / control_server.SOCKET_NAME
        return control_server.call(path, method, timeout_s=timeout_s, **fields)

    def pause(self) -> None:
        """Stops it where it is."""
        self.ask("pause")

    def resume(self) -> None:
        """Lets it go on."""
        self.ask("resume")

    def connect(
        self, network: str, *, ip: str | tuple[str, ...] = (), mac: str = ""
    ) -> Mapping[str, object]:
        """Gives it one more network interface; see :meth:`ringfence.Machine.connect`."""
        addresses = [ip] if isinstance(ip, str) else list(ip)
        return self.ask("connect", network=network, ip=addresses, mac=mac)

    def disconnect(self, network: str) -> None:
        """Takes its interface on a network away."""
        self.ask("disconnect", network=network)

    def stop(self, timeout_s: float = _STOP_GRACE_S) -> None:
        """Ends it in good order; by force after that time."""
        self._end("stop", timeout_s)

    def kill(self) -> None:
        """Ends it at once."""
        self._end("kill", 0.0)

    def _end(self, method: str, timeout_s: float) -> None:
        record = self._entry.record
        if not self._entry.is_held():
            message = f"the machine {record.name} is not running"
            raise StateError(message)
        with suppress(StateError):
            self.ask(method, timeout_s=timeout_s + 30.0)
        if not self._wait_released(timeout_s + 10.0):
            # The lock is held, so the process is its holder and no other of that number.
            with suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGKILL)
            self._wait_released(5.0)

    def _wait_released(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._entry.path.exists() and self._entry.is_held():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Lets go of it."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets go of it."""
        self.close()

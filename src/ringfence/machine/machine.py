"""The machine that a user holds."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import warnings
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Self, Unpack

from ringfence.errors import (
    ConfigError,
    GuestCrash,
    GuestTimeout,
    HostError,
    RingfenceError,
    StateError,
)
from ringfence.machine import engines, names, requests, state
from ringfence.machine.commands import CommandDefaults, Commands
from ringfence.machine.control_server import SOCKET_NAME, ControlServer
from ringfence.machine.driver import Place
from ringfence.machine.options import MachineOptions, spec_from
from ringfence.machine.phases import Phases
from ringfence.machine.spec import DirectoryRoot, DiskRoot, ImageRoot, MachineSpec, root_words
from ringfence.machine.watch import Watch
from ringfence.network.options import LinkSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from ringfence.machine.driver import AgentLike, Ending, Running

__all__ = ["Machine"]

_log = logging.getLogger(__name__)

_STOP_GRACE_S = 10.0
# Leaving a machine that changes files may take longer: what it wrote must not be lost on a slow host.
_CLOSE_GRACE_S = 60.0
# Who kills it knows that.
_ENDED_IN_ORDER = ("poweroff", "reboot", "killed")


class Machine(Commands):
    """An isolated machine. A context manager: entering starts it, leaving destroys it.

    Args:
        spec: What it is; else say it by keywords.
        command: What it is started for, as ``ps`` shows it.
        keep: Its record and logs outlive it, until ``ringfence rm``.
        phases: Is told how long each part of the start takes.
        **options: See :class:`ringfence.machine.options.MachineOptions`.

    Raises:
        ConfigError: What is asked for isn't possible.

    Example:
        >>> with Machine(memory="1G") as machine:                 # doctest: +SKIP
        ...     print(machine.run(["uname", "-r"]).stdout)
    """

    def __init__(
        self,
        spec: MachineSpec | None = None,
        *,
        command: tuple[str, ...] = (),
        keep: bool = False,
        phases: Phases | None = None,
        **options: Unpack[MachineOptions],
    ) -> None:
        if spec is not None and options:
            message = "give a machine either a specification or keywords, not both"
            raise ConfigError(message)
        self._spec = spec or spec_from(options)
        self._command = command
        self._keep = keep
        self._phases = phases or Phases()
        self._lock = threading.RLock()
        self._entry: state.Entry | None = None
        self._running: Running | None = None
        self._ended_by: RingfenceError | None = None
        self._resources = ExitStack()
        self._watch: Watch | None = None
        self._closed = False
        self._end_was_told = False
        self._reason = ""
        self._defaults = CommandDefaults.of(self._spec)

    def start(self) -> Self:
        """Starts it and waits until it takes commands.

        Raises:
            StateError: It was started before.
            RingfenceError: It can't be started, by whose fault it is; nothing is left behind.
        """
        with self._lock:
            if self._closed or self._running is not None:
                message = "a machine is started once"
                raise StateError(message, hint="make another with the same specification")
            choice = engines.choose(self._spec.engine)
            self._reason = choice.reason
            self._spec = dataclasses.replace(self._spec, engine=choice.engine)  # type: ignore[arg-type]
            begin = time.perf_counter()
            self._take_images_word()
            entry = state.create(self._record())
            try:
                driver = engines.load_driver(choice.engine)
                self._running = driver.start(self._spec, Place.of(entry), self._phases)
                self._entered(entry, self._running)
                self._running.await_ready()
                self.make_workdir()
            except BaseException:
                with suppress(GuestCrash):
                    self.close()
                entry.remove()
                raise
            self._phases.add("total", time.perf_counter() - begin)
        return self

    def _take_images_word(self) -> None:
        """Fills in what an image says, which is fetched when it isn't here."""
        if isinstance(self._spec.root, ImageRoot):
            # Most machines have no image, and the store takes its time to import.
            from ringfence.machine import image_plan  # noqa: PLC0415

            image = image_plan.find(self._spec.root, self._phases)
            self._spec, self._command = image_plan.with_defaults(self._spec, image, self._command)
            self._defaults = CommandDefaults.of(self._spec)

    def _entered(self, entry: state.Entry, running: Running) -> None:
        """What follows once there is a process that will run it."""
        self._entry = entry
        info = running.info
        entry.update(status="running", vm_pid=info.pid, kernel=info.kernel)
        methods = requests.methods(self, running)
        self._resources.callback(ControlServer(entry.sockets / SOCKET_NAME, methods).close)
        self._watch = Watch(self._spec.timeouts, self._time_is_up)
        self._resources.callback(self._watch.close)

    def _record(self) -> state.Record:
        spec = self._spec
        return state.Record(
            id=names.new_id(),
            name=spec.name,
            engine=spec.engine,
            command=self._command,
            root=root_words(spec.root),
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            network=", ".join(link.network for link in spec.links) or "none",
            remove=not self._keep,
            user=spec.user,
            workdir=spec.workdir,
            env=tuple(spec.env.items()),
        )

    @property
    def spec(self) -> MachineSpec:
        """What it is; once it was started with the engine that was chosen."""
        return self._spec

    @property
    def id(self) -> str:
        """Its ID; empty before it was started."""
        return self._entry.record.id if self._entry else ""

    @property
    def name(self) -> str:
        """Its name; made up at the start if none was given."""
        return self._entry.record.name if self._entry else self._spec.name

    @property
    def command(self) -> tuple[str, ...]:
        """What it was started for; once it was started with what its image says."""
        return self._command

    @property
    def engine(self) -> str:
        """What runs it."""
        return self._spec.engine

    @property
    def engine_reason(self) -> str:
        """Why it is that engine."""
        return self._reason

    @property
    def kernel(self) -> str:
        """Its kernel's version."""
        return self._entry.record.kernel if self._entry else ""

    @property
    def timing(self) -> Mapping[str, float]:
        """How long each part of the start took, in seconds."""
        return self._phases.seconds

    @property
    def entry(self) -> state.Entry:
        """What is written of it.

        Raises:
            StateError: It was never started.
        """
        if self._entry is None:
            message = "the machine was not started"
            raise StateError(message, hint="use it with `with`, or call start()")
        return self._entry

    def _live(self) -> Running:
        running = self._running
        if self._ended_by is not None:
            raise self._ended_by
        if running is None or self._closed:
            message = "the machine is closed" if self._closed else "the machine was not started"
            raise StateError(message, hint="use it with `with`, or call start()")
        return running

    def _running_agent(self) -> AgentLike:
        return self._live().agent

    def _why_gone(self) -> RingfenceError | None:
        if self._ended_by is None and self._running is not None:
            ending = self._running.wait(2.0)
            if ending is None:
                return None
            self._end_was_told = True
            words = f"the machine {self.name} ended: {ending.message}\n{ending.detail}"
            # The watch knows better why, if it was it.
            return self._time_error() or GuestCrash(words.rstrip())
        return self._ended_by

    def _time_error(self) -> RingfenceError | None:
        return self._ended_by

    def _command_began(self) -> None:
        if self._watch is not None:
            self._watch.command_began()

    def _command_ended(self) -> None:
        if self._watch is not None:
            self._watch.command_ended()

    def _time_is_up(self, reason: str) -> None:
        self._ended_by = GuestTimeout(f"the machine {self.name} was ended: {reason}")
        if self._running is not None:
            self._running.kill()

    def pause(self) -> None:
        """Stops it where it is; its memory stays."""
        self._live().pause()
        self.entry.update(status="paused")

    def resume(self) -> None:
        """Lets it go on."""
        self._live().resume()
        self.entry.update(status="running")

    def balloon(self, target_mib: int) -> None:
        """Asks the guest to do without so much of its memory, which the host has back then.

        Raises:
            ConfigError: More than it has.
        """
        self._live().balloon(target_mib)

    def stats(self, *, engine_counters: bool = False) -> Mapping[str, object]:
        """What it uses of the host; with ``engine_counters`` those too."""
        return self._live().stats(engine_counters=engine_counters)

    def inspect(self) -> Mapping[str, object]:
        """What it is made of."""
        return self._live().inspect()

    def connect(
        self, network: str, *, ip: str | tuple[str, ...] = (), mac: str = ""
    ) -> Mapping[str, object]:
        """Gives it one more network interface, while it runs.

        Args:
            network: A mode, or the name of a network.
            ip: Its addresses there; chosen when empty, as is ``mac``.
            mac: Its Ethernet address there.
        """
        link = LinkSpec(network=network, mac=mac, addresses=(ip,) if isinstance(ip, str) else ip)
        with self._lock:
            found = self._live().connect(link)
            self._tell_networks()
            return found

    def disconnect(self, network: str) -> None:
        """Takes its interface on a network away.

        Raises:
            NotFoundError: It isn't on that network.
        """
        with self._lock:
            self._live().disconnect(network)
            self._tell_networks()

    def _tell_networks(self) -> None:
        self.entry.update(network=", ".join(self._live().networks) or "none")

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        """Waits until it ends; None when it still runs after that time."""
        return self._live().wait(timeout_s)

    def stop(self, timeout_s: float = _STOP_GRACE_S) -> None:
        """Ends it in good order: commands end, disks are written; by force after that time."""
        running = self._live()
        with suppress(RingfenceError, OSError):
            # Commands that don't end by themselves get no more than a service manager gives them.
            running.agent.power_off(grace_s=max(0.1, min(timeout_s, _STOP_GRACE_S) / 2))
        if running.wait(timeout_s) is None:
            _log.warning("the machine %s did not end in %g s and is killed", self.name, timeout_s)
            running.kill()

    def kill(self) -> None:
        """Ends it at once."""
        self._live().kill()

    @property
    def keeps_changes(self) -> bool:
        """Whether it changes anything that outlives it, so that it should end in good order."""
        root = self._spec.root
        direct = isinstance(root, DirectoryRoot | DiskRoot) and root.writable
        return direct or any(not mount.read_only for mount in self._spec.mounts)

    def close(self, *, exit_code: int | None = None) -> None:
        """Destroys it: ends it if it still runs, and forgets it unless it is to be kept.

        Args:
            exit_code: How its command ended, to keep.

        Raises:
            GuestCrash: It ended before all that it changed outside of itself was written.
        """
        lost: GuestCrash | None = None
        with self._lock:
            if self._closed:
                return
            if self._running is not None and self.keeps_changes and self._ended_by is None:
                with suppress(RingfenceError):
                    self.stop(_CLOSE_GRACE_S)
                lost = self._lost(self._running)
            self._closed = True
            self._resources.close()
            if self._running is not None:
                self._running.close()
            if self._entry is not None:
                self._forget(self._entry, exit_code)
        if lost is not None:
            raise lost

    def _lost(self, running: Running) -> GuestCrash | None:
        """Says of a machine that changes files that it ended by itself, unless that was said."""
        ending = running.wait(0.0)
        if self._end_was_told or ending is None or ending.reason in _ENDED_IN_ORDER:
            return None
        words = f"the machine {self.name} ended before all was written: {ending.message}"
        return GuestCrash(f"{words}\n{ending.detail}".rstrip())

    def _forget(self, entry: state.Entry, exit_code: int | None) -> None:
        if not self._keep:
            entry.remove()
            return
        error = "" if self._ended_by is None else self._ended_by.message
        with suppress(HostError):
            entry.update(status="exited", exit_code=exit_code, error=error)
        entry.release()

    def __enter__(self) -> Self:
        """Starts it."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Destroys it."""
        try:
            self.close()
        except GuestCrash:
            # What went wrong before comes first.
            if error is None:
                raise

    def __del__(self) -> None:
        """Warns when it was started and never closed; its end follows at once."""
        if getattr(self, "_running", None) is not None and not self._closed:
            message = f"the machine {self.name} was not closed"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)
            self.close()

"""create and exec for bundles in virtual machines; the other commands are those of containers."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import TYPE_CHECKING

from ringfence.container import container, hooks
from ringfence.container.fields import Fields
from ringfence.container.oci_vm import bundle as bundles
from ringfence.container.oci_vm import monitor, passing
from ringfence.container.state import State, process_start
from ringfence.errors import HostError, RingfenceError, UnsupportedError
from ringfence.machine.attached import AttachedMachine

if TYPE_CHECKING:
    from typing import NoReturn

    from ringfence.container.container import CreateOptions
    from ringfence.container.spec import Bundle

__all__ = ["Monitor", "create", "execute", "stand_in"]


class Monitor:
    """A monitor that was started; what a container's launch is, for the runtime's commands.

    Args:
        pid: Its number.
        channel: To it.
    """

    __slots__ = ("_channel", "pid")

    def __init__(self, pid: int, channel: monitor.Channel) -> None:
        self.pid = pid
        self._channel = channel

    def follow(self, bundle: Bundle, state: State) -> None:
        """Runs the hooks that come before the machine, and waits for that.

        Raises:
            HostError: A hook failed, or the machine didn't start.
        """
        while message := self._channel.hear():
            if "error" in message:
                raise HostError(str(message["error"]))
            if "entered" in message:
                document = state.document("creating")
                for kind in ("prestart", "createRuntime"):
                    hooks.run(bundle.config, kind, document)
                self._channel.tell(go=True)
            if "ready" in message:
                return
        message_text = "the machine's monitor ended before the machine was there"
        raise HostError(message_text)

    def reap(self) -> None:
        """Ends a start that failed."""
        try:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        except (ChildProcessError, ProcessLookupError):
            return

    def close(self) -> None:
        """Lets go of it. It goes on."""
        if self._channel.descriptor >= 0:
            os.close(self._channel.descriptor)
            self._channel.descriptor = -1


def create(
    bundle: Bundle, root: str, name: str, options: CreateOptions, engine: str
) -> tuple[State, Monitor]:
    """Starts the machine of a bundle, to the point where its program runs or waits to be started.

    Raises:
        ConflictError: There is a container of that ID.
        UnsupportedError: A machine can't have what the bundle asks for.
        HostError: A step failed; nothing is left.
    """
    bundles.check(bundle)
    if options.keep:
        message = "--preserve-fds: a program in a virtual machine can't have the host's descriptors"
        raise UnsupportedError(message)
    state = State.make(root, name)
    started: Monitor | None = None
    try:
        state.bundle, state.rootfs, state.created = bundle.path, bundle.rootfs, container.now()
        state.annotations = bundle.config.mapping("annotations")
        state.engine, state.machine = engine, _machine_name(root, name)
        state.save_config(f"{bundle.path}/config.json")
        state.group = container.take_group(bundle, name, options)
        state.group.make()
        state.group.limit(Fields(bundles.host_resources(bundle.linux.table("resources"))))
        if options.wait_for_start:
            os.mkfifo(state.fifo, 0o600)
        started = _start(bundle, state, options)
        state.pid, state.start = started.pid, process_start(started.pid)[1]
        state.save()
        started.follow(bundle, state)
        if options.pid_file:
            container.write_pid_file(options.pid_file, state.pid)
    except BaseException:
        if started is not None:
            started.reap()
            started.close()
        container.destroy(state)
        raise
    finally:
        if options.scope is not None:
            options.scope.release()
    return state, started


def _machine_name(root: str, name: str) -> str:
    # IDs of containers may be longer than names, and are of one runtime's root alone.
    return f"oci-{hashlib.sha256(f'{root}/{name}'.encode()).hexdigest()[:16]}"


def _start(bundle: Bundle, state: State, options: CreateOptions) -> Monitor:
    import socket

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        status = 1
        try:
            channel = monitor.Channel(theirs.detach())
            status = monitor.run(
                bundle, state, channel, options.console, waits=options.wait_for_start
            )
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    theirs.close()
    return Monitor(pid, monitor.Channel(ours.detach()))


def execute(state: State, process: Fields, console: int, *, detach: bool, pid_file: str) -> int:
    """Runs a further program in a bundle's machine; returns its exit status.

    Args:
        state: The container.
        process: As a configuration says it.
        console: A connected socket that gets the terminal, or -1.
        detach: Return when it was started; another process stands for it.
        pid_file: Gets that process's number.

    Raises:
        RingfenceError: It can't be started.
    """
    if not detach:
        if pid_file:
            container.write_pid_file(pid_file, os.getpid())
        return _execute(state, process, console)
    pid = stand_in(state, process, console).pid
    if pid_file:
        container.write_pid_file(pid_file, pid)
    return 0


def stand_in(state: State, process: Fields, console: int) -> Monitor:
    """Starts a process of the host that runs a further program, and ends as that does."""
    pid = os.fork()
    if pid == 0:
        _stand_for(state, process, console)
    return Monitor(pid, monitor.Channel(-1))


def _stand_for(state: State, process: Fields, console: int) -> NoReturn:
    status = 255
    try:
        monitor.detach_from([console] if console >= 0 else [])
        status = _execute(state, process, console)
    except (RingfenceError, OSError) as error:
        os.write(2, f"{error}\n".encode())
    finally:
        os._exit(status)


def _execute(state: State, process: Fields, console: int) -> int:
    signals = passing.Signals()
    monitor.join_groups(state)
    terminal = monitor.open_terminal(console, process)
    with AttachedMachine(state.machine) as machine:
        linux = state.config().table("linux")
        return monitor.serve(machine, process, linux, terminal, signals)

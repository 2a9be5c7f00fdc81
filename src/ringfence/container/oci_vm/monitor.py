"""The monitor: a process of the host that holds a bundle's machine and stands for its program."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import sys
import termios
import tty
from contextlib import suppress
from typing import TYPE_CHECKING

from ringfence.container import lean_json
from ringfence.container.cgroups import files
from ringfence.container.oci_vm import bundle as bundles
from ringfence.container.oci_vm import passing
from ringfence.errors import HostError, RingfenceError
from ringfence.machine.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringfence.container.fields import Fields
    from ringfence.container.spec import Bundle
    from ringfence.container.state import State
    from ringfence.machine.commands import Commands

__all__ = ["Channel", "detach_from", "join_groups", "open_terminal", "run", "serve"]

_CLONE_NEWNET = 0x4000_0000
_LOOPBACK = "lo"


class Channel:
    """Messages between the runtime and the monitor, a JSON document a line."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._buffer = b""

    def tell(self, **message: object) -> None:
        """Sends one; nobody need be there any more."""
        with suppress(OSError):
            os.write(self.descriptor, lean_json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, object]:
        """The next message; empty when the other end is gone."""
        while b"\n" not in self._buffer:
            chunk = os.read(self.descriptor, 1 << 16)
            if not chunk:
                return {}
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = lean_json.loads(line, "the monitor's message")
        return dict(message) if isinstance(message, dict) else {}


def detach_from(caller: Iterable[int]) -> None:
    """Leaves the caller's session, and closes what isn't its own to keep.

    Args:
        caller: Descriptors that stay, beyond the three standard ones.
    """
    os.setsid()
    keep = {0, 1, 2, *caller}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with suppress(OSError):
                os.close(int(name))
    gc.enable()


def join_groups(state: State) -> None:
    """Puts this process into the container's control groups, and with it all that it starts.

    Raises:
        HostError: The kernel refused.
    """
    for _names, path, _version in state.group.directories if state.group else ():
        files.write(f"{path}/cgroup.procs", os.getpid())


def _enter_network(bundle: Bundle) -> None:
    """Enters the bundle's network namespace, or a new one.

    Raises:
        HostError: The kernel refused.
    """
    if "network" not in bundle.namespaces:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    path = bundle.namespaces["network"]
    if path:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        result = libc.setns(number, _CLONE_NEWNET)
        os.close(number)
    else:
        result = libc.unshare(_CLONE_NEWNET)
    if result:
        code = ctypes.get_errno()
        message = f"cannot enter the network namespace {path or '(a new one)'}: {os.strerror(code)}"
        raise HostError(message, errno=code)


def open_terminal(console: int, process: Fields) -> int:
    """Makes a terminal, sends its one end away and returns the other as this process's own.

    Args:
        console: A connected socket that gets it; -1: there is none, and -1 is returned.
        process: As a configuration says it, with the size.
    """
    if console < 0:
        return -1
    ours, theirs = os.openpty()
    size = process.table("consoleSize")
    if size.integer("height") and size.integer("width"):
        termios.tcsetwinsize(theirs, (size.integer("height"), size.integer("width")))
    # What is typed goes to the guest's terminal as it is; that one edits and echoes.
    tty.setraw(theirs)
    name = os.ttyname(theirs)
    # The first that a session's leader opens is its own: it is told of new sizes.
    os.close(os.open(name, os.O_RDWR))
    with socket.socket(fileno=console) as connection:
        socket.send_fds(connection, [name.encode()], [ours])
    os.close(ours)
    return theirs


def serve(
    commands: Commands, process: Fields, linux: Fields, terminal: int, signals: passing.Signals
) -> int:
    """Runs a program in a machine to its end; returns its exit status.

    Args:
        commands: The machine.
        process: As a configuration says it.
        linux: The configuration's ``linux``.
        terminal: From :func:`open_terminal`.
        signals: Those for the program.

    Raises:
        GuestCrash: The machine ended under it.
    """
    arguments, environment, directory, user = bundles.command(process)
    size = passing.size_of(terminal) if terminal >= 0 else None
    streams = (0, 1, 2) if terminal < 0 else (terminal, terminal, terminal)
    running = commands.popen(
        arguments,
        env=environment,
        workdir=directory,
        user=user,
        terminal=size,
        privileges=bundles.privileges(process, linux),
    )
    with running:
        signals.pass_on(running, terminal)
        return passing.attend(running, streams)


def run(bundle: Bundle, state: State, channel: Channel, console: int, *, waits: bool) -> int:
    """The monitor's whole life; returns the exit status that stands for the program's.

    Args:
        bundle: What runs.
        state: Its record.
        channel: To the runtime that started this process.
        console: A connected socket that gets the terminal, or -1.
        waits: Whether the program waits for ``start``.
    """
    signals = passing.Signals()
    try:
        detach_from(number for number in (channel.descriptor, console) if number >= 0)
        join_groups(state)
        _enter_network(bundle)
        channel.tell(entered=True)
        # Hooks of the engine connect the network in between.
        if not channel.hear():
            return 1
        connected = any(name != _LOOPBACK for _number, name in socket.if_nameindex())
        spec = bundles.machine_spec(bundle, state.machine, state.engine, connected=connected)
        with Machine(spec, command=tuple(bundle.process.texts("args"))) as machine:
            for name, value in bundle.linux.mapping("sysctl").items():
                machine.files.write(f"/proc/sys/{name.replace('.', '/')}", value.encode())
            # An engine waits for it before the start.
            terminal = open_terminal(console, bundle.process)
            channel.tell(ready=True)
            if waits:
                with open(state.fifo, "wb", buffering=0) as gate:
                    gate.write(b"0")
            os.close(channel.descriptor)
            return serve(machine, bundle.process, bundle.linux, terminal, signals)
    except (RingfenceError, OSError) as error:
        channel.tell(error=str(error))
        sys.stderr.write(f"{error}\n")
        return 1

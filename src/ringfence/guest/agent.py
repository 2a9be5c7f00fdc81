"""The host's end of a guest's agent (docs/reference/agent-protocol.md).

    agent = Agent.accept(handout, connect, timeout_s=30)
    agent.setup(GuestSetup(root=RootSpec.virtiofs("root")))
    process = agent.exec(ExecSpec(argv=("uname", "-r")))
    output, errors = process.communicate()
    assert process.wait() == 0

All of it is synchronous and may be called from any thread. A stream that nobody reads holds up the
command's writing to it and nothing else. Errors that any method may raise: AgentError when the guest
is gone or breaks the protocol, GuestTimeout when it doesn't answer.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ringfence.errors import AgentError, GuestTimeout, StateError
from ringfence.guest import messages
from ringfence.guest.files import FileInfo, Files, call
from ringfence.guest.frames import Connection, Json, Kind, failure, parse
from ringfence.guest.process import RemoteProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ringfence.guest.spec import ExecSpec, GuestSetup, InterfaceSpec

__all__ = ["PORT", "Agent", "FileInfo", "Files", "GuestStats", "RemoteProcess", "connect_vsock"]

PORT = 1024
_PROTOCOL = 1
_PORTS = struct.Struct("<II")
_CONNECT_TIMEOUT_S = 10.0


def connect_vsock(path: Path, port: int = PORT, *, timeout_s: float = 10.0) -> socket.socket:
    """A connection to a guest's port through the VM process's UNIX socket.

    Args:
        path: The socket.
        port: The guest's.
        timeout_s: How long the guest may take to accept.

    Raises:
        AgentError: The VM process is gone, or nobody listens on the port.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(b"CONNECT %d\n" % port)
        answer = _read_line(sock)
        sock.settimeout(None)
    except OSError as error:
        sock.close()
        message = f"cannot reach port {port} of the guest by {path}: {error}"
        raise AgentError(message) from error
    except BaseException:
        sock.close()
        raise
    if not answer.startswith(b"OK "):
        sock.close()
        message = f"nobody listens on port {port} in the guest"
        raise AgentError(message)
    return sock


def _read_line(sock: socket.socket) -> bytes:
    """The handshake's answer; what comes behind it is the guest's."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 64:
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return line


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestStats:
    """How a guest is doing.

    Args:
        uptime_s: Since its kernel started.
        memory_total_bytes: What its kernel has.
        memory_available_bytes: What programs could still get.
        cpu_user_s: Processor time in programs, all processors together.
        cpu_system_s: In its kernel.
        cpu_idle_s: Spent waiting.
        load_1: Load average of the last minute.
        processes: How many there are.
        cpus: Processors that are up.
    """

    uptime_s: float
    memory_total_bytes: int
    memory_available_bytes: int
    cpu_user_s: float
    cpu_system_s: float
    cpu_idle_s: float
    load_1: float
    processes: int
    cpus: int


class Agent:
    """A guest's agent. A context manager; closing it doesn't end the guest.

    Args:
        connect: Makes a connection to the guest's port 1024.
        control: The connection that the guest made; None when another process has it.
        kernel: The guest's ``uname -r``; empty when it isn't known.
    """

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        control: Connection | None = None,
        kernel: str = "",
    ) -> None:
        self._connect_socket = connect
        self._control = control
        self._closed = False
        self.kernel = kernel
        self.files = Files(self._connect)

    @classmethod
    def accept(
        cls,
        handout: socket.socket,
        connect: Callable[[], socket.socket],
        timeout_s: float,
    ) -> Agent:
        """Waits for the guest's hello.

        Args:
            handout: The host's end of the VM process's ``handout_fd``. Connections to other ports
                that come meanwhile are refused.
            connect: Makes a connection to the guest's port 1024 (:func:`connect_vsock`).
            timeout_s: How long the guest may take to boot.

        Raises:
            GuestTimeout: No hello came.
            AgentError: The VM process is gone, or the agent is of another version.
        """
        deadline = time.monotonic() + timeout_s
        control = Connection(_receive_connection(handout, deadline))
        try:
            kernel = _hello(control, max(0.0, deadline - time.monotonic()))
        except BaseException:
            control.close()
            raise
        return cls(connect, control, kernel)

    @classmethod
    def attach(cls, connect: Callable[[], socket.socket]) -> Agent:
        """The agent of a guest that another process has set up."""
        return cls(connect)

    def _connect(self) -> Connection:
        if self._closed:
            message = "the connection to the guest is closed"
            raise StateError(message)
        try:
            return Connection(self._connect_socket())
        except OSError as error:
            message = f"cannot reach the guest's agent: {error}"
            raise AgentError(message) from error

    def setup(self, setup: GuestSetup, timeout_s: float = 60.0) -> dict[str, int]:
        """Sets the guest up and returns how many microseconds each phase took.

        Raises:
            StateError: It is set up already.
            GuestError: A step failed in the guest; the message names it.
            ConfigError: A step can't be done as asked.
        """
        if self._control is None:
            message = "this guest has been set up already"
            raise StateError(message)
        self._control.send_json(Kind.SETUP, messages.setup(setup, time.time_ns()))
        frame = self._control.receive(timeout_s)
        if frame.kind is Kind.ERROR:
            raise failure(frame.payload)
        if frame.kind is not Kind.READY:
            message = f"the guest's agent broke the protocol: {frame.kind.name} for READY"
            raise AgentError(message)
        phases = parse(frame.payload).get("phases_us")
        if not isinstance(phases, dict):
            return {}
        return {str(name): us for name, us in phases.items() if isinstance(us, int)}

    def exec(self, spec: ExecSpec) -> RemoteProcess:
        """Starts a command. One that can't be started ends with 126 or 127 and a ``message``."""
        connection = self._connect()
        try:
            connection.send_json(Kind.REQUEST, messages.exec_request(spec))
        except BaseException:
            connection.close()
            raise
        return RemoteProcess(connection, terminal=spec.terminal is not None, stdin=spec.stdin)

    def ping(self) -> None:
        """Waits for the agent's answer."""
        self._call("ping", {})

    def stats(self) -> GuestStats:
        """How the guest is doing."""
        answer = self._call("stats", {})
        return GuestStats(
            uptime_s=_real(answer, "uptime_s"),
            memory_total_bytes=int(_real(answer, "memory_total_bytes")),
            memory_available_bytes=int(_real(answer, "memory_available_bytes")),
            cpu_user_s=_real(answer, "cpu_user_s"),
            cpu_system_s=_real(answer, "cpu_system_s"),
            cpu_idle_s=_real(answer, "cpu_idle_s"),
            load_1=_real(answer, "load_1"),
            processes=int(_real(answer, "processes")),
            cpus=int(_real(answer, "cpus")),
        )

    def add_interface(self, interface: InterfaceSpec) -> None:
        """Finds a network card that was put in, and sets it up."""
        self._call("add_interface", {"interface": messages.interface(interface)})

    def remove_interface(self, mac: str) -> None:
        """Lets go of a network card that will be taken out."""
        self._call("remove_interface", {"mac": mac})

    def sync_time(self) -> float:
        """Sets the guest's clock to the host's; returns by how many seconds it changed."""
        return _real(self._call("sync_time", {"time_ns": time.time_ns()}), "change_ns") / 1e9

    def power_off(self, *, reboot: bool = False, grace_s: float = 5.0) -> None:
        """Asks the guest to end all commands, write everything back and power off.

        It returns when the guest has begun; the VM process's end says when it is done.

        Args:
            reboot: Start again instead.
            grace_s: What commands get between SIGTERM and SIGKILL.
        """
        self._call("power_off", {"reboot": reboot, "grace_ms": int(grace_s * 1000)})

    def _call(self, operation: str, fields: Json) -> Json:
        return call(self._connect, operation, fields)

    def close(self) -> None:
        """Closes the control connection. The guest goes on."""
        self._closed = True
        if self._control is not None:
            self._control.close()
            self._control = None

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def _receive_connection(handout: socket.socket, deadline: float) -> socket.socket:
    """The guest's connection to the agent's port."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            message = "the guest's agent didn't come up in time"
            raise GuestTimeout(message, hint="the machine's log has what its kernel said")
        handout.settimeout(left)
        try:
            data, fds, _, _ = socket.recv_fds(handout, _PORTS.size + 1, 1)
        except TimeoutError:
            continue
        except OSError as error:
            message = f"the VM process's connections can't be received: {error}"
            raise AgentError(message) from error
        if not data and not fds:
            message = "the VM process ended before the guest's agent was up"
            raise AgentError(message, hint="the machine's log has what its kernel said")
        if len(data) == _PORTS.size and len(fds) == 1 and _PORTS.unpack(data)[0] == PORT:
            return socket.socket(fileno=fds[0])
        for fd in fds:
            os.close(fd)


def _hello(control: Connection, timeout_s: float) -> str:
    """The guest's kernel, as its first word says."""
    frame = control.receive(timeout_s)
    if frame.kind is not Kind.HELLO:
        message = f"the guest's agent broke the protocol: {frame.kind.name} for HELLO"
        raise AgentError(message)
    hello = parse(frame.payload)
    if hello.get("version") != _PROTOCOL:
        message = f"the guest's agent speaks version {hello.get('version')}"
        raise AgentError(message, hint="remove the cached initramfs and build the agent")
    return str(hello.get("kernel", ""))[:128]


def _real(value: Json, name: str) -> float:
    number = value.get(name)
    if not isinstance(number, int | float):
        message = f"the guest's agent broke the protocol: no number {name}"
        raise AgentError(message)
    return float(number)

"""The gateway process of a user-space network (docs/reference/gateway.md): started, steered, ended."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from ringfence import _binaries
from ringfence.errors import ConfigError, ConflictError, HostError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from ringfence.network.options import PublishedPort

__all__ = ["Gateway", "bind_published", "connect", "ensure", "listens", "spawn", "stop"]

_MAX_ANSWER = 1 << 20
_TIMEOUT_S = 10.0
_BACKLOG = 1024

Json = dict[str, object]

# Gateways that outlive the machine that started them; kept here to be reaped.
_CHILDREN: list[subprocess.Popen[bytes]] = []


class Gateway:
    """A running gateway, by a control connection. A context manager: leaving it closes that.

    Args:
        control: A SOCK_SEQPACKET connection to it.
        process: The process, if it is ours to wait for.
    """

    def __init__(
        self, control: socket.socket, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._control = control
        self._process = process
        control.settimeout(_TIMEOUT_S)

    @property
    def pid(self) -> int | None:
        """Its process ID, if it is ours."""
        return self._process.pid if self._process is not None else None

    def call(self, method: str, params: object = None, fds: Sequence[int] = ()) -> object:
        """Asks it something.

        Raises:
            StateError: It is gone.
            ConfigError: It refuses.
        """
        request: Json = {"method": method}
        if params is not None:
            request["params"] = params
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], list(fds))
            answer = self._control.recv(_MAX_ANSWER)
        except OSError as error:
            message = f"the network's gateway doesn't answer: {error.strerror or error}"
            raise StateError(message) from error
        if not answer:
            message = "the network's gateway has ended"
            raise StateError(message, hint="its last words are in the machine's vm.log")
        found = cast("Json", json.loads(answer))
        if "error" in found:
            message = f"the network's gateway refuses: {found['error']}"
            raise ConfigError(message)
        return found.get("result")

    def status(self) -> Mapping[str, object]:
        """Links with counters, connections, refusals by reason."""
        return cast("Json", self.call("status"))

    def refusals(self) -> Mapping[str, object]:
        """What was refused: counts by reason, and the last ones."""
        return cast("Json", self.call("refusals"))

    def close(self) -> None:
        """Closes the connection; an owner's gateway ends with it."""
        self._control.close()
        if self._process is not None:
            try:
                self._process.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()


def spawn(
    document: Mapping[str, object],
    fds: Sequence[int],
    *,
    control_path: Path,
    log: Path | None,
    owned: bool,
) -> Gateway:
    """Starts a gateway.

    Args:
        document: What it serves; descriptors in it are among ``fds``.
        fds: Descriptors that it inherits; the caller closes its own.
        control_path: Where others may steer it; made here.
        log: Where its log goes; nowhere when None.
        owned: It ends with this connection; else when its last link is gone.

    Raises:
        HostError: It can't be started.
        ConfigError: It refuses the document.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ExitStack() as stack, theirs:
        stack.callback(ours.close)
        listener = stack.enter_context(_listen(control_path))
        stack.callback(_unlink, control_path)
        whole = {**document, "listen_fd": listener.fileno()}
        inherited = [*fds, listener.fileno()]
        if owned:
            whole["control_fd"] = theirs.fileno()
            inherited.append(theirs.fileno())
        process = _start(whole, inherited, log)
        if not owned:
            _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None] + [process]
        theirs.close()
        if not owned:
            ours.close()
            ours = _connect(control_path)
            stack.callback(ours.close)
        gateway = Gateway(ours, process if owned else None)
        try:
            gateway.status()
        except StateError as error:
            process.wait(_TIMEOUT_S)
            words = log.read_text(errors="replace")[-500:] if log else ""
            message = f"the network's gateway could not be started\n{words}".rstrip()
            raise HostError(message) from error
        listener.close()
        stack.pop_all()
    return gateway


def _start(
    document: Mapping[str, object], fds: Sequence[int], log: Path | None
) -> subprocess.Popen[bytes]:
    program = _binaries.find("ringfence-gateway")
    config = os.memfd_create("gateway", os.MFD_CLOEXEC)
    try:
        os.write(config, json.dumps(document).encode())
        os.lseek(config, 0, os.SEEK_SET)
        with (log or Path(os.devnull)).open("ab") as err:
            return subprocess.Popen(
                [program, "--config-fd", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                pass_fds=[*fds, config],
                env={},
                start_new_session=True,
            )
    except OSError as error:
        message = f"cannot start {program}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(program)) from error
    finally:
        os.close(config)


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # It has its name once it listens: whoever finds one that doesn't may take it away.
    fresh = path.with_suffix(".new")
    _unlink(fresh)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(fresh))
        listener.listen(8)
        fresh.rename(path)
    except OSError as error:
        listener.close()
        message = f"cannot make the control socket {path}: {error.strerror or error}"
        raise HostError(message, errno=error.errno, path=str(path)) from error
    return listener


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _connect(path: Path) -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        control.connect(str(path))
    except OSError as error:
        control.close()
        message = f"the network's gateway at {path} doesn't answer: {error.strerror}"
        raise StateError(message) from error
    return control


def connect(path: Path) -> Gateway:
    """Reaches a gateway that another process started.

    Raises:
        StateError: There is none.
    """
    return Gateway(_connect(path))


def ensure(path: Path, log: Path, document: Callable[[], Json]) -> Gateway:
    """The gateway at a path; started, to end with its last link, when it isn't there.

    Raises:
        HostError: It can't be started.
    """
    with ExitStack() as stack, suppress(StateError):
        found = stack.enter_context(connect(path))
        found.status()
        stack.pop_all()
        return found
    return spawn(document(), [], control_path=path, log=log, owned=False)


def listens(path: Path) -> bool:
    """Whether a gateway listens there, if it is one of a gateway at all."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            # It has others to listen to.
            return True
    return True


def stop(path: Path, log: Path) -> None:
    """Ends a gateway that another process started, if it runs, and what it left."""
    with suppress(StateError), connect(path) as running:
        running.call("stop")
    _unlink(path)
    _unlink(log)


def bind_published(port: PublishedPort, *, listen: bool = True) -> socket.socket:
    """A socket of the host at a published port.

    Args:
        port: The port.
        listen: Take connections; else the port is only kept from others.

    Raises:
        ConflictError: The port is in use.
        ConfigError: The host has no such address.
        HostError: The host refuses it.
    """
    family = socket.AF_INET6 if ":" in port.address else socket.AF_INET
    kind = socket.SOCK_DGRAM if port.transport == "udp" else socket.SOCK_STREAM
    bound = socket.socket(family, kind)
    try:
        if port.transport == "tcp" and listen:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((port.address, port.host))
        if port.transport == "tcp" and listen:
            bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        what = f"cannot publish {port}: {error.strerror}"
        if isinstance(error, PermissionError):
            hint = "ports below 1024 need root, or: sysctl net.ipv4.ip_unprivileged_port_start=0"
            raise HostError(what, hint=hint, errno=error.errno) from error
        if error.errno == errno.EADDRNOTAVAIL:
            message = f"cannot publish {port}: this host has no address {port.address}"
            raise ConfigError(message, hint="ip addr lists them") from error
        hint = "choose another port of the host, or 0 for any that is free"
        raise ConflictError(what, hint=hint) from error
    return bound

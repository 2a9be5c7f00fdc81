"""Terminals of the runtime: handed to an engine, or copied to the caller's own."""

from __future__ import annotations

import _socket as sockets  # the module around it loads enums and selectors
import os

from ringfence.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.container.launch import Launch
    from ringfence.container.oci_vm.runtime import Monitor
    from ringfence.container.state import State

__all__ = ["connect", "run_attached"]

_CHUNK = 65536


def connect(path: str) -> int:
    """A connection to an engine's console socket, which gets the terminal.

    Raises:
        HostError: Nobody listens there.
    """
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except OSError as error:
        message = f"cannot connect to the console socket {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=path) from error
    return connection.detach()


def run_attached(
    start: Callable[[int], tuple[State, Launch | Monitor]], end: Callable[[State], None]
) -> int:
    """Runs a container on the caller's terminal; returns its exit status.

    Args:
        start: Starts it; gets the descriptor of the socket that the terminal is sent to.
        end: Removes it.

    Raises:
        ConfigError: Standard input isn't a terminal.
    """
    import termios
    import tty

    host = _host_terminal()
    ours, theirs = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_STREAM)
    state, launch = start(theirs.fileno())
    theirs.close()
    _data, ancillary, _flags, _address = ours.recvmsg(4096, sockets.CMSG_LEN(4))
    ours.close()
    master = int.from_bytes(ancillary[0][2][:4], "little")
    before = termios.tcgetattr(host)
    try:
        tty.setraw(host)
        output = termios.tcgetattr(host)
        output[1] |= termios.OPOST | termios.ONLCR
        termios.tcsetattr(host, termios.TCSANOW, output)
        return _copy(master, launch.pid, host)
    finally:
        termios.tcsetattr(host, termios.TCSADRAIN, before)
        os.close(master)
        launch.close()
        end(state)


def _host_terminal() -> int:
    """The terminal that this process is used on: a stream's, else the session's own.

    Raises:
        ConfigError: There is none.
    """
    for number in (0, 1, 2):
        if os.isatty(number):
            return number
    try:
        return os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        message = "the container wants a terminal, and this process has none"
        hint = 'set "terminal": false, or use --console-socket'
        raise ConfigError(message, hint=hint) from error


def _copy(master: int, pid: int, host: int) -> int:
    """Copies both ways until the terminal's last user is gone."""
    import select
    import signal

    from ringfence.container.waiting import exit_status

    def resize(*_unused: object) -> None:
        size = os.get_terminal_size(host)
        import termios

        termios.tcsetwinsize(master, (size.lines, size.columns))

    signal.signal(signal.SIGWINCH, resize)
    resize()
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(master, select.POLLIN)
    while True:
        for number, _event in poll.poll():
            source, target = (0, master) if number == 0 else (master, 1)
            try:
                data = os.read(source, _CHUNK)
            except OSError:
                # The kernel's way to say that nobody has the terminal any more.
                data = b""
            if not data and number == master:
                return exit_status(os.waitpid(pid, 0)[1])
            if not data:
                poll.unregister(0)
                continue
            os.write(target, data)

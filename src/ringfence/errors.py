"""What can go wrong, by whose fault it is.

The tree::

    RingfenceError
      ├ ConfigError (ValueError)   you asked wrongly; nothing was started
      ├ StateError                 a right call at the wrong moment (closed, paused)
      ├ UnsupportedError           this host or engine can't; names what is missing
      ├ NotFoundError              no machine, image, kernel or network of that name
      ├ ConflictError              the name, port or address is taken
      ├ HostError (OSError)        the host refused; keeps errno and path
      ├ GuestError                 the guest's doing
      │   ├ CommandError           a command ended with a status other than 0 and check=True
      │   ├ GuestCrash             the guest's kernel panicked or its processor shut down
      │   ├ GuestTimeout (TimeoutError)  it took longer than it was given
      │   └ AgentError             the guest's agent doesn't answer or breaks the protocol
      ├ FormatError                an image, disk or snapshot is corrupt or too new
      └ InternalError              our bug: please report; a native panic lands here

Every message says what failed and why; ``hint`` says what to do about it, in words or as the
exact command.
"""

from __future__ import annotations

__all__ = [
    "AgentError",
    "CommandError",
    "ConfigError",
    "ConflictError",
    "FormatError",
    "GuestCrash",
    "GuestError",
    "GuestTimeout",
    "HostError",
    "InternalError",
    "NotFoundError",
    "RingfenceError",
    "StateError",
    "UnsupportedError",
]


class RingfenceError(Exception):
    """Root of everything that Ringfence raises on purpose.

    Args:
        message: What failed and why, in one sentence.
        hint: What to do about it; empty when there is nothing to say.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The message, with the hint on a line of its own."""
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(RingfenceError, ValueError):
    """You asked wrongly. Nothing was started."""


class StateError(RingfenceError):
    """A right call at the wrong moment: the machine is closed, paused or not yet running."""


class UnsupportedError(RingfenceError):
    """This host or engine can't do it. The message names the missing ability."""


class NotFoundError(RingfenceError):
    """There is no machine, image, kernel or network of that name."""


class ConflictError(RingfenceError):
    """The name, port or address is taken."""


class HostError(RingfenceError, OSError):
    """The host refused.

    Args:
        message: What failed and why.
        hint: What to do about it.
        errno: The kernel's error number, when there is one.
        path: The file concerned, when there is one.
    """

    def __init__(
        self, message: str, *, hint: str = "", errno: int | None = None, path: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno
        self.filename = path


class GuestError(RingfenceError):
    """The guest's doing."""


class CommandError(GuestError):
    """A command in the guest ended with a status other than 0, and ``check=True`` was asked.

    Args:
        message: The command and how it ended.
        exit_code: Its exit status; 128 + N when signal N ended it.
        stdout: What it had written, as far as it was captured.
        stderr: Likewise.
    """

    def __init__(
        self, message: str, *, exit_code: int, stdout: bytes = b"", stderr: bytes = b""
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class GuestCrash(GuestError):  # noqa: N818 - it is the event, not a fault of ours
    """The guest's kernel panicked or its processor shut down."""


class GuestTimeout(GuestError, TimeoutError):  # noqa: N818 - reads as the event
    """The guest took longer than it was given."""


class AgentError(GuestError):
    """The guest's agent doesn't answer or breaks the protocol."""


class FormatError(RingfenceError):
    """An image, disk or snapshot is corrupt or too new."""


class InternalError(RingfenceError):
    """A bug in Ringfence. Please report it with the message and the machine's log."""

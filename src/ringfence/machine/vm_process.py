"""One ``ringfence-vm`` process: started from a document, and held until it has ended."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

from ringfence import _binaries
from ringfence.errors import GuestCrash, HostError, InternalError, RingfenceError
from ringfence.machine import reports
from ringfence.machine.control import Control, error_of_kind
from ringfence.machine.driver import Ending

if TYPE_CHECKING:
    from ringfence.machine.document import Document
    from ringfence.machine.driver import Place

__all__ = ["VmProcess"]

_READY_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 10.0
_TAIL_BYTES = 4096
# The serial port is for the kernel's last words; it has no use for gigabytes.
_CONSOLE_BYTES = 4 << 20

_ENDINGS = {
    "poweroff": "the guest turned itself off",
    "reboot": "the guest reset itself",
    "panic": "the guest's kernel panicked",
    "crash": "the guest's processor shut down (triple fault)",
    "killed": "it was killed",
    "failed": "the VM process could not go on",
    "error": "the machine could not be started",
}


class VmProcess:
    """A running VM process.

    Args:
        document: What it is told; its descriptors are closed by the caller.
        place: Where its logs go.

    Raises:
        HostError: It can't be started.
    """

    def __init__(self, document: Document, place: Place) -> None:
        self._place = place
        self._ending: Ending | None = None
        ours, theirs = socket.socketpair()
        document.set("control_fd", document.give(theirs.detach()))
        try:
            self._process = self._spawn(document)
        except BaseException:
            ours.close()
            raise
        self._control = Control(ours)

    def _spawn(self, document: Document) -> subprocess.Popen[bytes]:
        program = _binaries.find("ringfence-vm")
        console = self._place.folder / "console.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            out = document.give(os.open(console, flags, 0o600))
            document.set("serial", {"out_fd": out, "total_bytes": _CONSOLE_BYTES})
            config, fds = document.finish()
            with (self._place.folder / "vm.log").open("ab") as log:
                return subprocess.Popen(
                    [program, "--config-fd", str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=fds,
                    env={},
                    # The terminal's signals are for us: we end the machine in order.
                    start_new_session=True,
                )
        except OSError as error:
            if isinstance(error, HostError):
                raise
            message = f"cannot start {program}: {error.strerror}"
            raise HostError(message, errno=error.errno, path=str(program)) from error

    @property
    def pid(self) -> int:
        """Its process ID."""
        return self._process.pid

    @property
    def control(self) -> Control:
        """Asks it things."""
        return self._control

    def wait_ready(self) -> dict[str, object]:
        """Waits until the vCPUs run.

        Raises:
            RingfenceError: The machine could not be started, by whose fault it is.
        """
        event = self._control.wait_event("ready", "exit", timeout_s=_READY_TIMEOUT_S)
        if event is not None and event.get("event") == "ready":
            return event
        raise self.failure(event)

    def failure(self, event: dict[str, object] | None = None) -> RingfenceError:
        """Why the machine ended when it should not have."""
        if event is None:
            event = self._control.wait_event("exit", timeout_s=1.0)
        if event is not None and event.get("reason") == "error":
            kind, text = str(event.get("kind")), str(event.get("message"))
            if event.get("path"):
                text = f"{text} ({event['path']})"
            return error_of_kind(kind, text)
        ending = self.wait(_END_TIMEOUT_S)
        if ending is None:
            message = "the VM process neither starts the machine nor ends"
            return HostError(message, hint=f"see {self._place.folder / 'vm.log'}")
        words = f"{ending.message}\n{ending.detail}".rstrip()
        if ending.reason in ("failed", "error"):
            return InternalError(words)
        return GuestCrash(words)

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        """How it ended; None when it still runs after that time."""
        if self._ending is None:
            event = self._control.wait_event("exit", timeout_s=timeout_s)
            if event is None and not self._control.ended:
                return None
            try:
                status = self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                status = self._process.wait()
            self._ending = self._ending_of(event, status)
        return self._ending

    def _ending_of(self, event: dict[str, object] | None, status: int) -> Ending:
        if event is None:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            message = f"the VM process ended by {how} without a word"
            return Ending(reason="failed", message=message, detail=self._last_words())
        reason = str(event.get("reason"))
        message = _ENDINGS.get(reason, reason)
        said = str(event.get("message") or "")
        if said and reason in ("failed", "error", "crash"):
            message = f"{message}: {said}"
        report = event.get("report")
        if isinstance(report, str):
            path = reports.save(self._place.name, message, report)
            if path is not None:
                message = (
                    f"{message}\nthe guest's state is in {path}; it belongs into a report of this"
                )
        detail = "" if reason in ("poweroff", "killed") else self._last_words()
        return Ending(reason=reason, message=message, detail=detail)

    def _last_words(self) -> str:
        parts = []
        for name in ("vm.log", "console.log"):
            path = self._place.folder / name
            with suppress(OSError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                if text := file.read().decode(errors="replace").strip():
                    parts.append(f"--- the end of {name}:\n{text}")
        return "\n".join(parts)

    def kill(self) -> None:
        """Ends the machine at once."""
        self._control.close()
        try:
            status = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if self._ending is None:
            event: dict[str, object] = {"reason": "killed", "status": status}
            known = self._control.wait_event("exit", timeout_s=0.0)
            self._ending = self._ending_of(known or event, status)

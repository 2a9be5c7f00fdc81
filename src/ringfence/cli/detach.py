"""A machine in the background: held by a process of its own that outlives the command line."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from ringfence.cli import output
from ringfence.errors import InternalError, RingfenceError
from ringfence.machine.control_server import error_from, error_to
from ringfence.machine.logs import LogWriter
from ringfence.machine.machine import Machine
from ringfence.machine.phases import Phases
from ringfence.machine.process import read_some

if TYPE_CHECKING:
    from ringfence.machine.spec import MachineSpec

__all__ = ["run_detached"]

_CHUNK = 1 << 16


def run_detached(spec: MachineSpec, command: tuple[str, ...], *, keep: bool, quiet: bool) -> int:
    """Starts a machine that goes on without us, and prints its name.

    Raises:
        RingfenceError: It could not be started.
    """
    report, theirs = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.close(report)
        _hold(spec, command, theirs, keep=keep)
    os.close(theirs)
    with (
        output.Spinner("starting a machine", quiet=quiet) as spinner,
        os.fdopen(report, "rb") as lines,
    ):
        answer: dict[str, object] = {}
        for line in lines:
            answer = json.loads(line)
            if "phase" in answer:
                spinner.say(f"starting a machine: {answer['phase']}")
    if "name" not in answer:
        if "error" in answer:
            raise error_from(answer["error"])
        message = "the process that holds the machine ended before it was started"
        raise InternalError(message)
    print(answer["id"] if quiet else answer["name"])
    return 0


def _hold(spec: MachineSpec, command: tuple[str, ...], report: int, *, keep: bool) -> NoReturn:
    """Runs the machine to its end in this process, which belongs to no terminal."""
    status = 0
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        # What our starter had open is not ours to hold.
        os.closerange(3, report)
        os.closerange(report + 1, 1 << 16)
        _run(spec, command, report, keep=keep)
    except BaseException:
        status = 1
    finally:
        os._exit(status)


def _run(spec: MachineSpec, command: tuple[str, ...], report: int, *, keep: bool) -> None:
    def say(**fields: object) -> None:
        with suppress(OSError):
            os.write(report, json.dumps(fields).encode() + b"\n")

    phases = Phases(on_change=lambda phase: say(phase=phase))
    machine = Machine(spec, command=command, keep=keep, phases=phases)
    code: int | None = None
    try:
        machine.start()
        process = machine.popen(machine.command, stdin=False) if machine.command else None
    except RingfenceError as error:
        say(error=error_to(error))
        machine.close()
        if machine.id:
            machine.entry.remove()
        return
    say(name=machine.name, id=machine.id)
    os.close(report)
    try:
        with LogWriter(machine.entry.log) as log:
            if process is None:
                machine.wait()
            else:
                readers = [
                    _start_reader(process.stdout, 1, log),
                    _start_reader(process.stderr, 2, log),
                ]
                code = process.wait()
                for reader in readers:
                    reader.join()
                if process.message:
                    log.write(2, f"{process.message}\n".encode())
    finally:
        machine.close(exit_code=code)


def _start_reader(source: BinaryIO, stream: int, log: LogWriter) -> threading.Thread:
    def read() -> None:
        with suppress(OSError, ValueError, RingfenceError):
            while chunk := read_some(source, _CHUNK):
                log.write(stream, chunk)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread

"""Drives ``ringfence-vm`` as its callers do, below the Python package: a document and descriptors.

with VmProcess(program, engine="kvm", kernel=kernel, cmdline="console=ttyS0") as vm:
    vm.wait_ready()
    vm.call("stats")
    assert vm.wait_exit()["reason"] == "panic"
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

Json = dict[str, object]

TIMEOUT_S = 120.0


class VmProcess:
    """One ``ringfence-vm`` process. A context manager: leaving it kills the process.

    Args:
        program: The executable.
        engine: ``kvm`` or ``bt``.
        kernel: A bzImage or an ELF image.
        initramfs: What the kernel unpacks.
        cmdline: The kernel's command line.
        memory_mib: RAM.
        vcpus: Processors.
        devices: Further devices, as the document has them.
        descriptors: Descriptors that ``devices`` name: they are inherited under their numbers.
        change: Fields of the document to set in place of the usual ones.
        env: The environment.
    """

    def __init__(
        self,
        program: Path,
        *,
        engine: str,
        kernel: Path,
        initramfs: Path | None = None,
        cmdline: str = "",
        memory_mib: int = 256,
        vcpus: int = 1,
        devices: Sequence[Json] = (),
        descriptors: Sequence[int] = (),
        change: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._program = program
        self._kernel = kernel
        self._initramfs = initramfs
        self._given = list(descriptors)
        self._env = dict(env or {})
        self._document: Json = {
            "version": 1,
            "name": "test",
            "engine": engine,
            "memory_mib": memory_mib,
            "vcpus": vcpus,
            "boot": {"cmdline": cmdline},
            "devices": list(devices),
        }
        self._change = dict(change or {})
        self._stack = ExitStack()
        self._next_id = 1
        self._pending = b""
        self._serial = bytearray()
        self.events: list[Json] = []
        self.started_s = 0.0
        self.process: subprocess.Popen[bytes]
        self.control: socket.socket
        self._log: Path

    def __enter__(self) -> Self:
        """Starts the process."""
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kills the process if it still runs."""
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        with ExitStack() as ours:
            fds: list[int] = [*self._given]

            def give(fd: int) -> int:
                ours.callback(os.close, fd)
                fds.append(fd)
                return fd

            self.control, theirs = socket.socketpair()
            stack.enter_context(self.control)
            serial_read, serial_write = os.pipe()
            boot: Json = {**_object(self._document["boot"])}
            boot["kernel_fd"] = give(os.open(self._kernel, os.O_RDONLY))
            if self._initramfs is not None:
                boot["initramfs_fd"] = give(os.open(self._initramfs, os.O_RDONLY))
            document = {
                **self._document,
                "boot": boot,
                "control_fd": give(theirs.detach()),
                "serial": {"out_fd": give(serial_write)},
                **self._change,
            }
            config = give(os.memfd_create("config", 0))
            os.write(config, json.dumps(document).encode())
            os.lseek(config, 0, os.SEEK_SET)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-vm-"))
            self._log = Path(folder) / "log"
            with self._log.open("wb") as log:
                self.started_s = time.monotonic()
                self.process = subprocess.Popen(
                    [self._program, "--config-fd", str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=fds,
                    env=self._env,
                )
        reader = threading.Thread(target=self._read_serial, args=(serial_read,), daemon=True)
        reader.start()
        stack.callback(reader.join)
        # Called before the other: the reader ends with the process.
        stack.callback(self._end)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read_serial(self, fd: int) -> None:
        with os.fdopen(fd, "rb", buffering=0) as pipe:
            while chunk := pipe.read(65536):
                self._serial += chunk

    def serial(self) -> str:
        """What the guest sent over the serial port so far."""
        return self._serial.decode(errors="replace")

    def log(self) -> str:
        """What the process wrote on standard error."""
        return self._log.read_text(errors="replace")

    def _receive(self, deadline: float) -> Json:
        while b"\n" not in self._pending:
            self.control.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                chunk = self.control.recv(1 << 16)
            except TimeoutError as error:
                message = f"no word from the VM process\n{self.log()}\n{self.serial()[-2000:]}"
                raise TimeoutError(message) from error
            if not chunk:
                message = f"the VM process is gone\n{self.log()}\n{self.serial()[-2000:]}"
                raise ConnectionError(message)
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return _object(json.loads(line))

    def wait_event(self, name: str, timeout_s: float = TIMEOUT_S) -> Json:
        """The next event of this name.

        Raises:
            TimeoutError: It doesn't come.
            ConnectionError: The process ends without it.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for event in self.events:
                if event.get("event") == name:
                    self.events.remove(event)
                    return event
            message = self._receive(deadline)
            self.events.append(message)

    def wait_ready(self) -> Json:
        """The event that says that the machine runs."""
        return self.wait_event("ready")

    def wait_exit(self, timeout_s: float = TIMEOUT_S) -> Json:
        """The event that says how the machine ended."""
        return self.wait_event("exit", timeout_s)

    def wait_serial(self, text: str, timeout_s: float = TIMEOUT_S) -> None:
        """Waits for a piece of serial output.

        Raises:
            TimeoutError: It doesn't come.
        """
        deadline = time.monotonic() + timeout_s
        while text not in self.serial():
            if time.monotonic() > deadline or self.process.poll() is not None:
                message = f"{text!r} did not come\n{self.log()}\n{self.serial()[-3000:]}"
                raise TimeoutError(message)
            time.sleep(0.01)

    def call(self, method: str, params: Json | None = None) -> Json:
        """The answer to a request: an object with ``result`` or ``error``."""
        number = self._next_id
        self._next_id += 1
        request = {"id": number, "method": method, "params": params or {}}
        self.control.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            message = self._receive(deadline)
            if message.get("id") == number:
                return message
            self.events.append(message)


def _object(value: object) -> Json:
    if not isinstance(value, dict):
        message = f"not an object: {value!r}"
        raise TypeError(message)
    return value

"""A host with hardware virtualization, wherever the tests run.

QEMU emulates a processor with AMD-V and nested paging in software. Inside it runs the distribution's
cloud kernel with kvm-amd loaded, and everything of the outer host's file system, read only under a
layer in memory: a program that was built outside is there at the same path. The host is slow (an
emulated processor), but its KVM does what a real one does.

    python -m tests.framework.nested_host -- target/debug/deps/conformance-0123
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from tests.framework import nested_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

RUNNER = Path(__file__).with_name("nested_runner.py")
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
# TCG doesn't tell the nested KVM of a guest's XSETBV: at the next entry XCR0 is what KVM last knew,
# and guests lose SSE registers. Without XSAVE they use FXSAVE, which works.
PROCESSOR = "EPYC,-xsave,-avx,-avx2,-fma,-f16c"
MEMORY_MIB = 3072
BOOT_TIMEOUT_S = 120.0


class NestedHostError(RuntimeError):
    """The nested host itself failed; the message ends with its console."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """How a command in the nested host ended.

    Args:
        status: Exit status; negative for a signal.
        timed_out: It was killed after its time.
        stdout: What it wrote.
        stderr: Likewise.
        took_s: From request to answer.
    """

    status: int
    timed_out: bool
    stdout: bytes
    stderr: bytes
    took_s: float


class NestedHost:
    """A booted nested host. A context manager: leaving it ends the host.

    Args:
        cpus: Its processors. With more than one, what QEMU emulates of AMD-V fails at times (ADR 21).
        memory_mib: Its memory, which holds the layer over the file system too.
        processor: Which one, as QEMU calls it.
    """

    def __init__(
        self, *, cpus: int = 1, memory_mib: int = MEMORY_MIB, processor: str = PROCESSOR
    ) -> None:
        self._processor = processor
        self._cpus = cpus
        self._memory_mib = memory_mib
        self._resources = contextlib.ExitStack()
        self._control: socket.socket | None = None
        self._console = Path()
        self._qemu: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def __enter__(self) -> Self:
        """Boots the host, which takes some seconds.

        Raises:
            NestedHostError: It did not come up.
            ArtifactError: A package is missing.
        """
        with contextlib.ExitStack() as stack:
            self._boot(stack)
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the host."""
        self._control = None
        self._resources.close()

    def _boot(self, stack: contextlib.ExitStack) -> None:
        image = nested_image.prepare()
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None or not VIRTIOFSD.exists():
            message = "QEMU is missing: apt-get install --no-install-recommends qemu-system-x86"
            raise NestedHostError(message)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-nested-")))
        self._console = folder / "console"
        files = folder / "files"
        share = [str(VIRTIOFSD), f"--socket-path={files}", "-o", "source=/", "-o", "cache=always"]
        share += ["-o", "sandbox=chroot", "--thread-pool-size=2"]
        with (folder / "virtiofsd").open("wb") as log:
            self._spawn(stack, share, log.fileno())
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "control"))
        listener.listen(1)
        _wait_for(files.exists, "virtiofsd")
        with (folder / "qemu").open("wb") as log:
            argv = [qemu, *self._arguments(image, folder)]
            self._qemu = self._spawn(stack, argv, log.fileno())
        listener.settimeout(BOOT_TIMEOUT_S)
        try:
            control, _ = listener.accept()
        except TimeoutError as error:
            self._fail("QEMU did not start", (folder / "qemu").read_text(), error)
        self._control = stack.enter_context(control)
        self._receive(BOOT_TIMEOUT_S)

    @staticmethod
    def _spawn(
        stack: contextlib.ExitStack, argv: Sequence[str], log: int
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        def end() -> None:
            process.kill()
            process.wait()

        stack.callback(end)
        return process

    def _arguments(self, image: nested_image.Image, folder: Path) -> list[str]:
        command_line = (
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr "
            f"PYTHON={os.path.realpath(sys.executable)} RUNNER={RUNNER.resolve()} "
            f"REPOSITORY={RUNNER.resolve().parents[2]}"
        )
        return [
            *("-machine", "q35,accel=tcg,memory-backend=ram", "-cpu", self._processor),
            *("-smp", str(self._cpus), "-m", f"{self._memory_mib}M"),
            *("-object", f"memory-backend-memfd,id=ram,size={self._memory_mib}M,share=on"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", command_line),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{self._console}"),
            *("-chardev", f"socket,id=files,path={folder / 'files'}"),
            *("-device", "vhost-user-fs-pci,chardev=files,tag=outer"),
            *("-chardev", f"socket,id=control,path={folder / 'control'}"),
            *("-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=control,name=control"),
        ]

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: bytes = b"",
        timeout_s: float = 300.0,
    ) -> Completed:
        """Runs a command to its end.

        Args:
            argv: Program and arguments; the program by its path here.
            env: Its environment; ours when not given.
            cwd: Where it runs; our directory when not given.
            stdin: What it reads.
            timeout_s: When it is killed.

        Raises:
            NestedHostError: The command could not be started, or the host failed.
        """
        if self._control is None:
            message = "the nested host is not running"
            raise NestedHostError(message)
        request = {
            "argv": [str(word) for word in argv],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "stdin": base64.b64encode(stdin).decode(),
            "timeout_s": timeout_s,
        }
        start = time.monotonic()
        self._control.sendall(json.dumps(request).encode() + b"\n")
        # The host kills the command itself; more silence than that means the host is gone.
        answer = self._receive(timeout_s + 60.0)
        if "error" in answer:
            raise NestedHostError(str(answer["error"]))
        return Completed(
            status=int(str(answer["status"])),
            timed_out=bool(answer["timed_out"]),
            stdout=base64.b64decode(str(answer["stdout"])),
            stderr=base64.b64decode(str(answer["stderr"])),
            took_s=time.monotonic() - start,
        )

    def console(self) -> str:
        """What the nested host's kernel wrote so far."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def _receive(self, timeout_s: float) -> dict[str, object]:
        if self._control is None:
            self._fail("the nested host has no control channel")
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            self._control.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                chunk = self._control.recv(1 << 20)
            except TimeoutError as error:
                self._fail(f"no answer within {timeout_s:.0f} s", cause=error)
            if not chunk:
                self._fail("the nested host ended")
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, object] = json.loads(line)
        return answer

    def _fail(self, what: str, detail: str = "", cause: Exception | None = None) -> NoReturn:
        message = f"{what}\n{detail}\nconsole:\n{self.console()[-4000:]}"
        raise NestedHostError(message) from cause


def _wait_for(ready: Callable[[], bool], what: str) -> None:
    """Polls for something that a started program makes."""
    deadline = time.monotonic() + 10.0
    while not ready():
        if time.monotonic() > deadline:
            message = f"{what} did not start within 10 s"
            raise NestedHostError(message)
        time.sleep(0.02)


def main() -> int:
    """Runs one command in a fresh nested host."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--processor", default=PROCESSOR, help="as QEMU calls it")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    start = time.monotonic()
    with NestedHost(cpus=options.cpus, processor=options.processor) as host:
        booted = time.monotonic() - start
        done = host.run(options.command, timeout_s=options.timeout)
        sys.stdout.buffer.write(done.stdout)
        sys.stderr.buffer.write(done.stderr)
        sys.stderr.write(f"[booted in {booted:.1f} s, ran {done.took_s:.1f} s]\n")
        if done.timed_out:
            sys.stderr.write(f"[killed after {options.timeout:.0f} s]\n{host.console()[-4000:]}\n")
            return 124
    return done.status if done.status >= 0 else 128 - done.status


if __name__ == "__main__":
    sys.exit(main())

"""Where the same commands run: on the host, in a guest of ours, in a guest of QEMU's."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks import programs
from ringfence import _binaries
from tests.framework.vm_process import VmProcess

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LINE = re.compile(r"^@ (\S+) (\d+) (\d+)\s*$", re.MULTILINE)
CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off i8042.noaux i8042.nomux i8042.dumbkbd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One line that a program reported.

    Args:
        name: Of the work.
        seconds: How long it took.
        check: What it computed: the same everywhere.
    """

    name: str
    seconds: float
    check: int


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a system did.

    Args:
        timed: What was reported.
        whole_s: From the start of the process to its end.
        first_s: From the start to the guest's first line; 0 on the host.
        text: All that was written.
    """

    timed: list[Timed] = field(default_factory=list)
    whole_s: float = 0.0
    first_s: float = 0.0
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a guest is given.

    Args:
        initramfs: From :func:`benchmarks.programs.initramfs`.
        vcpus: Processors.
        memory_mib: RAM.
        disk: A raw image for ``/dev/vda``; what is written to it is lost.
        timeout_s: How long it may take.
    """

    initramfs: Path
    vcpus: int = 1
    memory_mib: int = 512
    disk: Path | None = None
    timeout_s: float = 300.0


def parse(text: str) -> list[Timed]:
    """The reported lines."""
    return [
        Timed(name=name, seconds=int(ns) / 1e9, check=int(check))
        for name, ns, check in LINE.findall(text)
    ]


def native(commands: Sequence[str], root: Path | None = None) -> Outcome:
    """Runs the commands on the host.

    Args:
        commands: As for :func:`benchmarks.programs.initramfs`; ``/bench`` stands for the programs.
        root: A directory to run them in; needs root.
    """
    built = programs.build()
    with tempfile.NamedTemporaryFile("w", suffix=".list") as file:
        here = f"{built['init'].parent}/"
        lines = commands if root else [line.replace("/bench/", here) for line in commands]
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        start = time.monotonic()
        done = subprocess.run(
            [built["init"], "--native", root or "/", file.name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return Outcome(
        timed=parse(done.stdout), whole_s=time.monotonic() - start, text=done.stdout + done.stderr
    )


def ours(work: Work, engine: str = "bt") -> Outcome:
    """Runs a guest by one of our engines.

    Raises:
        TimeoutError: It didn't end.
        RuntimeError: It ended otherwise than by powering off.
    """
    with ExitStack() as stack:
        devices: list[dict[str, object]] = []
        descriptors = []
        if work.disk is not None:
            copy = stack.enter_context(tempfile.NamedTemporaryFile(dir=work.disk.parent))
            subprocess.run(
                ["cp", "--sparse=always", "--reflink=auto", work.disk, copy.name], check=True
            )
            descriptors.append(copy.fileno())
            devices.append({"type": "block", "fd": copy.fileno(), "format": "raw"})
        process = VmProcess(
            _binaries.find("ringfence-vm"),
            engine=engine,
            kernel=programs.kernel().image,
            initramfs=work.initramfs,
            cmdline=CMDLINE,
            memory_mib=work.memory_mib,
            vcpus=work.vcpus,
            devices=devices,
            descriptors=descriptors,
        )
        start = time.monotonic()
        vm = stack.enter_context(process)
        vm.wait_serial("@ init", work.timeout_s)
        first = time.monotonic() - start
        ended = vm.wait_exit(work.timeout_s)
        vm.process.wait(10)
        whole = time.monotonic() - start
        text = vm.serial()
        if ended["reason"] != "poweroff":
            message = f"the guest ended by {ended['reason']}\n{vm.log()}\n{text[-3000:]}"
            raise RuntimeError(message)
    return Outcome(timed=parse(text), whole_s=whole, first_s=first, text=text)


def qemu(work: Work, machine: str = "q35") -> Outcome:
    """Runs the same guest in QEMU with its own translator.

    Raises:
        TimeoutError: It didn't end.
    """
    argv = [
        *("qemu-system-x86_64", "-machine", machine, "-cpu", "max"),
        *("-accel", "tcg,thread=multi", "-smp", str(work.vcpus), "-m", f"{work.memory_mib}M"),
        *("-kernel", str(programs.kernel().image), "-initrd", str(work.initramfs)),
        *("-append", CMDLINE + (" reboot=t" if machine.startswith("microvm") else "")),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", "stdio"),
    ]
    if work.disk is not None:
        argv += ["-drive", f"file={work.disk},format=raw,if=none,id=disk,snapshot=on"]
        argv += ["-device", "virtio-blk-pci,drive=disk"]
    start = time.monotonic()
    first = 0.0
    output = bytearray()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        try:
            while chunk := os.read(fd, 65536):
                output += chunk
                if not first and b"@ init" in output:
                    first = time.monotonic() - start
                # A machine without power management halts in place of powering off.
                if b"\n@ end" in output and machine.startswith("microvm"):
                    break
                if time.monotonic() - start > work.timeout_s:
                    message = f"QEMU's guest didn't end\n{output[-3000:].decode(errors='replace')}"
                    raise TimeoutError(message)
            whole = time.monotonic() - start
        finally:
            process.kill()
    text = output.decode(errors="replace")
    return Outcome(timed=parse(text), whole_s=whole, first_s=first, text=text)

"""Where the same commands run: on the host, in a guest of ours, in a guest of QEMU's."""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from benchmarks import programs
from ringfence import _binaries
from tests.framework.vm_process import VmProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

LINE = re.compile(r"^@ (\S+) (\d+) (\d+)\s*$", re.MULTILINE)
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
MAC = "02:00:00:00:00:01"
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
        share: A directory that the guest has by virtio-fs, read only, under the tag ``share``.
        tap: An open TAP device, which its network card is plugged into.
        vhost: An instance of vhost-net, which moves the card's frames.
        timeout_s: How long it may take.
    """

    initramfs: Path
    vcpus: int = 1
    memory_mib: int = 512
    disk: Path | None = None
    share: Path | None = None
    tap: int | None = None
    vhost: int | None = None
    timeout_s: float = 300.0


def parse(text: str) -> list[Timed]:
    """The reported lines."""
    return [
        Timed(name=name, seconds=int(ns) / 1e9, check=int(check))
        for name, ns, check in LINE.findall(text)
    ]


def native(commands: Sequence[str], root: Path | None = None) -> Outcome:
    """Runs the commands on the host, in the environment that they have in a guest.

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
            capture_output=True, text=True, check=True, env={},
        )  # fmt: skip
    return Outcome(
        timed=parse(done.stdout), whole_s=time.monotonic() - start, text=done.stdout + done.stderr
    )


def prepare(work: Work, engine: str, stack: ExitStack) -> VmProcess:
    """A VM process that is yet to be started."""
    devices: list[dict[str, object]] = []
    descriptors = []
    if work.disk is not None:
        fd = stack.enter_context(_copy(work.disk)).fileno()
        descriptors.append(fd)
        devices.append({"type": "block", "fd": fd, "format": "raw"})
    if work.share is not None:
        fd = os.open(work.share, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        descriptors.append(fd)
        entry = {"path": "/", "fd": fd, "read_only": True, "cache": "auto"}
        devices.append({"type": "fs", "tag": "share", "entries": [entry]})
    if work.tap is not None:
        descriptors.append(work.tap)
        vhost = [] if work.vhost is None else [work.vhost]
        descriptors += vhost
        devices.append({"type": "net", "tap_fds": [work.tap], "vhost_fds": vhost, "mac": MAC})
    return VmProcess(
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


def _copy(image: Path) -> IO[bytes]:
    """A copy of an image that goes away by itself."""
    file = tempfile.NamedTemporaryFile(dir=image.parent)  # noqa: SIM115 - the caller closes it
    command: list[str | Path] = ["cp", "--sparse=always", "--reflink=auto", image, file.name]
    subprocess.run(command, check=True)
    return file


def ours(work: Work, engine: str = "bt") -> Outcome:
    """Runs a guest by one of our engines.

    Raises:
        TimeoutError: It didn't end.
        RuntimeError: It ended otherwise than by powering off.
    """
    with ExitStack() as stack:
        process = prepare(work, engine, stack)
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


def qemu(work: Work, machine: str = "q35", accel: str = "tcg") -> Outcome:
    """Runs the same guest in QEMU: with its own translator, or with KVM.

    Raises:
        TimeoutError: It didn't end.
    """
    argv = [
        *("qemu-system-x86_64", "-machine", f"{machine},memory-backend=ram"),
        *("-object", f"memory-backend-memfd,id=ram,size={work.memory_mib}M,share=on"),
        *("-cpu", "max", "-accel", "tcg,thread=multi" if accel == "tcg" else accel),
        *("-smp", str(work.vcpus), "-m", f"{work.memory_mib}M"),
        *("-kernel", str(programs.kernel().packed), "-initrd", str(work.initramfs)),
        *("-append", CMDLINE + (" reboot=t" if machine.startswith("microvm") else "")),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", "stdio"),
    ]
    with ExitStack() as stack:
        if work.disk is not None:
            disk = stack.enter_context(_copy(work.disk)).name
            argv += ["-drive", f"file={disk},format=raw,if=none,id=disk"]
            argv += ["-device", "virtio-blk-pci,drive=disk"]
        if work.share is not None:
            argv += _virtiofsd(work.share, stack)
        if work.tap is not None:
            vhost = "" if work.vhost is None else f",vhost=on,vhostfd={work.vhost}"
            argv += ["-netdev", f"tap,id=net,fd={work.tap}{vhost}"]
            argv += ["-device", f"virtio-net-pci,netdev=net,mac={MAC},romfile="]
        return _run_qemu(argv, work, stops=not machine.startswith("microvm"))


def _virtiofsd(share: Path, stack: ExitStack) -> list[str]:
    """Starts QEMU's file server and returns how its device is named."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "files"
    argv = [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={share}", "-o", "cache=auto"]
    server = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    stack.callback(server.wait)
    stack.callback(server.kill)
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    device = "vhost-user-fs-pci,chardev=files,tag=share"
    return ["-chardev", f"socket,id=files,path={path}", "-device", device]


def _run_qemu(argv: list[str], work: Work, *, stops: bool) -> Outcome:
    """Runs QEMU to its end, or to the guest's where the machine can't power off."""
    start = time.monotonic()
    first = 0.0
    output = bytearray()
    taps = [fd for fd in (work.tap, work.vhost) if fd is not None]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=taps
    ) as process:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        try:
            while chunk := _read(fd, start + work.timeout_s):
                output += chunk
                if not first and b"@ init" in output:
                    first = time.monotonic() - start
                if not stops and b"\n@ end" in output:
                    break
            whole = time.monotonic() - start
        except TimeoutError as error:
            message = f"QEMU's guest didn't end\n{output[-3000:].decode(errors='replace')}"
            raise TimeoutError(message) from error
        finally:
            process.kill()
    text = output.decode(errors="replace")
    return Outcome(timed=parse(text), whole_s=whole, first_s=first, text=text)


def _read(fd: int, deadline: float) -> bytes:
    """What a pipe has next; nothing at its end."""
    ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        raise TimeoutError
    return os.read(fd, 65536)

"""A booted guest with its agent, below the Python package's machines: the VM process and the client.

with Guest(devices=[share("root", host_entries(stack))]) as guest:
    guest.agent.setup(...)
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ringfence.guest import initramfs, kernels
from ringfence.guest.agent import Agent, connect_vsock
from tests.framework.programs import agent_program, vm_program
from tests.framework.vm_process import VmProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.guest.kernels import Kernel
    from ringfence.guest.spec import ExecSpec
    from tests.framework.vm_process import Json

CMDLINE = "console=ttyS0 quiet panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd rdinit=/init"
BOOT_TIMEOUT_S = 120.0


class Guest:
    """A context manager: leaving it kills the VM process.

    Args:
        engine: What runs it.
        devices: Besides the vsock device.
        descriptors: That ``devices`` name.
        memory_mib: RAM.
        vcpus: Processors.
    """

    def __init__(
        self,
        *,
        engine: str = "bt",
        devices: Sequence[Json] = (),
        descriptors: Sequence[int] = (),
        memory_mib: int = 256,
        vcpus: int = 1,
    ) -> None:
        self._engine = engine
        self._devices = devices
        self._descriptors = descriptors
        self._memory_mib = memory_mib
        self._vcpus = vcpus
        self._stack = contextlib.ExitStack()
        self.kernel: Kernel
        self.vm: VmProcess
        self.agent: Agent

    def __enter__(self) -> Self:
        """Boots it up to the agent's hello."""
        with contextlib.ExitStack() as stack:
            self._boot(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Kills it."""
        self._stack.close()

    def _boot(self, stack: contextlib.ExitStack) -> None:
        self.kernel = kernels.find()
        image = initramfs.build(self.kernel, agent_program())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-guest-")))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "vsock"))
        listener.listen(64)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        vsock: Json = {
            "type": "vsock",
            "cid": 3,
            "listen_fd": listener.fileno(),
            "handout_fd": theirs.fileno(),
        }
        self.vm = VmProcess(
            vm_program(),
            engine=self._engine,
            kernel=self.kernel.image,
            initramfs=image,
            cmdline=CMDLINE,
            memory_mib=self._memory_mib,
            vcpus=self._vcpus,
            devices=[*self._devices, vsock],
            descriptors=[*self._descriptors, listener.fileno(), theirs.fileno()],
        )
        with theirs:
            stack.enter_context(self.vm)
        connect = functools.partial(connect_vsock, folder / "vsock")
        try:
            self.agent = stack.enter_context(Agent.accept(ours, connect, BOOT_TIMEOUT_S))
        except Exception as error:
            error.add_note(f"{self.vm.log()}\n{self.vm.serial()[-3000:]}")
            raise

    def run(self, spec: ExecSpec, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """A command's exit code and output."""
        with self.agent.exec(spec) as process:
            output, errors = process.communicate(stdin, timeout_s=BOOT_TIMEOUT_S)
            return process.wait(), output, errors


def share(stack: contextlib.ExitStack, tag: str, paths: dict[str, Path]) -> tuple[Json, list[int]]:
    """A virtio-fs device that shows host paths at places of its tree, read only.

    Links of the host are shown as links; the device and its descriptors, closed with ``stack``.
    """
    entries: list[Json] = []
    fds = []
    for place, path in paths.items():
        if path.is_symlink():
            entries.append({"path": place, "symlink": str(path.readlink())})
            continue
        fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        fds.append(fd)
        entries.append({"path": place, "fd": fd, "read_only": True, "ids": "host"})
    return {"type": "fs", "tag": tag, "entries": entries}, fds


def host_programs() -> dict[str, Path]:
    """The host's own programs as a root."""
    names = ("usr", "etc", "bin", "sbin", "lib", "lib64")
    return {f"/{name}": Path("/") / name for name in names if Path("/", name).exists()}

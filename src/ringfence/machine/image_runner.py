"""Runs the RUN instructions of a build, each in a machine of its own."""

from __future__ import annotations

import contextlib
import threading
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ringfence.errors import RingfenceError
from ringfence.machine.machine import Machine
from ringfence.machine.spec import DirectoryRoot, MachineSpec, Mount

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from ringfence.image.build.runner import RunStep
    from ringfence.machine.spec import EngineName

__all__ = ["MachineRunner"]

_SHOWN_OVER = ("hostname", "hosts", "resolv.conf")


class MachineRunner:
    """Runs commands in machines.

    Args:
        engine: What runs them.
        memory_mib: RAM of each.
        vcpus: Virtual processors of each.
        network: What ``RUN`` has unless it says otherwise: ``none``, ``user``, ...
    """

    def __init__(
        self,
        engine: EngineName = "auto",
        *,
        memory_mib: int = 1024,
        vcpus: int = 1,
        network: str = "none",
    ) -> None:
        self._engine: EngineName = engine
        self._memory_mib = memory_mib
        self._vcpus = vcpus
        self._network = network

    def run(self, step: RunStep) -> int:
        """Runs a command to its end; see :class:`ringfence.image.build.runner.Runner`."""
        mounts = [
            Mount(source=m.source, target=PurePosixPath(m.target), read_only=m.read_only)
            for m in step.mounts
        ]
        _make_room(step.root)
        spec = MachineSpec(
            engine=self._engine,
            vcpus=self._vcpus,
            memory_mib=self._memory_mib,
            root=DirectoryRoot(path=step.root, writable=True),
            mounts=tuple(mounts),
            network="none" if step.network == "none" else self._network,
            env=dict(step.env),
            hostname="build",
        )
        with Machine(spec, command=step.argv) as machine:
            return _attend(machine, step)


def _attend(machine: Machine, step: RunStep) -> int:
    """Run the command and pass on what it writes."""
    with machine.popen(step.argv, workdir=step.workdir, user=step.user, stdin=False) as process:
        readers = [
            threading.Thread(target=_pass_on, args=(stream, step), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in readers:
            reader.start()
        code = process.wait()
        for reader in readers:
            reader.join()
        if process.message:
            step.output(f"{process.message}\n".encode())
    return code


def _pass_on(stream: BinaryIO, step: RunStep) -> None:
    # Whoever waits for the command hears why it broke off.
    with contextlib.suppress(RingfenceError, OSError):
        while data := stream.read(1 << 16):
            step.output(data)


def _make_room(root: Path) -> None:
    """Make the files that the machine shows its own over; they never come into a layer."""
    folder = root / "etc"
    if folder.is_dir() and not folder.is_symlink():
        for name in _SHOWN_OVER:
            with contextlib.suppress(FileExistsError):
                (folder / name).touch(exist_ok=False)

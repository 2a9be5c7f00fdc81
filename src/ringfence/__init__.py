"""Run any program, container image or operating system in an isolated machine.

Example:
    >>> import ringfence
    >>> with ringfence.Machine() as machine:                      # doctest: +SKIP
    ...     print(machine.run(["uname", "-r"]).stdout)
"""

from __future__ import annotations

# The OCI runtime is a process for every command, and imports this: typing alone would double its
# start, so the constant is our own.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.errors import RingfenceError
    from ringfence.machine.attached import AttachedMachine
    from ringfence.machine.machine import Machine
    from ringfence.machine.process import Process
    from ringfence.machine.result import Result
    from ringfence.machine.sandbox import Sandbox
    from ringfence.machine.spec import (
        DirectoryRoot,
        DiskRoot,
        HostRoot,
        ImageRoot,
        MachineSpec,
        Mount,
        Timeouts,
    )
    from ringfence.network.policy import Policy

__all__ = [
    "AttachedMachine",
    "DirectoryRoot",
    "DiskRoot",
    "HostRoot",
    "ImageRoot",
    "Machine",
    "MachineSpec",
    "Mount",
    "Policy",
    "Process",
    "Result",
    "RingfenceError",
    "Sandbox",
    "Timeouts",
]

# Where each name is: imported when it is used, so that `import ringfence` stays cheap.
_PLACES = {
    "AttachedMachine": "ringfence.machine.attached",
    "DirectoryRoot": "ringfence.machine.spec",
    "DiskRoot": "ringfence.machine.spec",
    "HostRoot": "ringfence.machine.spec",
    "ImageRoot": "ringfence.machine.spec",
    "Machine": "ringfence.machine.machine",
    "MachineSpec": "ringfence.machine.spec",
    "Mount": "ringfence.machine.spec",
    "Policy": "ringfence.network.policy",
    "Process": "ringfence.machine.process",
    "Result": "ringfence.machine.result",
    "RingfenceError": "ringfence.errors",
    "Sandbox": "ringfence.machine.sandbox",
    "Timeouts": "ringfence.machine.spec",
}


def __getattr__(name: str) -> object:
    """Imports a name when it is first used."""
    place = _PLACES.get(name)
    if place is None:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    import importlib  # noqa: PLC0415 - as above

    return getattr(importlib.import_module(place), name)


def __dir__() -> list[str]:
    """All names, imported or not."""
    return sorted(__all__)

"""The same machines for asyncio: the same names, awaited.

Each call runs in a thread, so other tasks go on while it waits. A task that is cancelled while a
command runs ends the command.

Example:
    >>> async with Machine() as machine:                              # doctest: +SKIP
    ...     results = await asyncio.gather(*(machine.run(["nproc"]) for _ in range(4)))
"""

from __future__ import annotations

from ringfence.aio.machine import Machine, Sandbox
from ringfence.aio.parts import Files, Process

__all__ = ["Files", "Machine", "Process", "Sandbox"]

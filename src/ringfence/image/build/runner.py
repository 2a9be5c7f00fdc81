"""What runs a RUN instruction: written for the build, fulfilled by any engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["RunMount", "RunStep", "Runner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMount:
    """A directory of the host that the command sees, and that isn't part of the layer.

    Args:
        source: On the host.
        target: Absolute in the image.
        read_only: Whether writing is refused.
    """

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """One command.

    Args:
        root: The root file system, writable: changes to it become the layer.
        argv: The command.
        env: Its whole environment.
        workdir: Where it runs; exists.
        user: Who runs it, as USER has it; empty means root.
        mounts: What else it sees.
        network: ``default``, ``none`` or ``host``.
        output: Is told what it writes, both streams, as it comes.
    """

    root: Path
    argv: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str = "/"
    user: str = ""
    mounts: tuple[RunMount, ...] = ()
    network: str = "default"
    output: Callable[[bytes], None] = field(default=lambda _: None)


class Runner(Protocol):
    """Runs commands on a root file system, isolated from the host."""

    def run(self, step: RunStep) -> int:
        """Run a command to its end.

        Returns:
            Its exit status; 128 + N when signal N ended it.

        Raises:
            RingfenceError: It couldn't be run.
        """
        ...

"""The guest's first file system: the agent and the modules that it may need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.guest.kernels import Kernel

__all__ = ["build"]


def build(kernel: Kernel, agent: Path) -> Path:
    """The initramfs for a kernel and an agent, made once and kept in the cache."""
    message = f"not yet: {kernel} {agent}"
    raise UnsupportedError(message)

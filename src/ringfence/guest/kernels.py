"""Guest kernels: found on this host, fetched from its distribution, or brought by the user.

In order: the one that is asked for, the cache, the host's ``/boot``, the distribution's package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Kernel", "fetch", "find", "import_kernel", "list_kernels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel and its modules.

    Args:
        version: As ``uname -r`` says in the guest.
        image: A bzImage or an ELF image.
        modules: The ``lib/modules/VERSION`` directory; may be empty when all is built in.
        source: Where it comes from: ``cache``, ``boot``, ``package NAME``, ``path``.
    """

    version: str
    image: Path
    modules: Path
    source: str


def find(choice: str | Path | None = None) -> Kernel:
    """The kernel to boot: ``choice`` (a path or a version) or the best there is, fetched if need be."""
    message = f"not yet: {choice}"
    raise UnsupportedError(message)


def fetch() -> Kernel:
    """Downloads the distribution's kernel package without root and keeps it in the cache."""
    message = "not yet"
    raise UnsupportedError(message)


def list_kernels() -> list[Kernel]:
    """The kernels that need no download: the cache's, then ``/boot``'s; newest first."""
    message = "not yet"
    raise UnsupportedError(message)


def import_kernel(image: Path, *, modules: Path | None = None, version: str = "") -> Kernel:
    """Copies a kernel and its modules into the cache."""
    message = f"not yet: {image} {modules} {version}"
    raise UnsupportedError(message)

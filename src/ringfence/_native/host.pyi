"""What this host can do, as measured."""

from pathlib import Path
from typing import final

__all__ = ["KvmProbe", "probe_kvm", "unpack_kernel"]

@final
class KvmProbe:
    """What the probe of ``/dev/kvm`` found."""

    @property
    def verdict(self) -> str:
        """``missing``, ``not_permitted``, ``broken``, ``emulating`` or ``usable``."""

    @property
    def summary(self) -> str:
        """The state of ``/dev/kvm`` in one sentence."""

    @property
    def remedy(self) -> str:
        """What to do about it; empty when it is usable."""

    @property
    def mips(self) -> float | None:
        """Guest speed in million instructions a second, when a guest ran."""

    @property
    def took_s(self) -> float:
        """How long the probe took."""

def probe_kvm() -> KvmProbe:
    """Opens ``/dev/kvm`` and times a loop in a throw-away guest, for about 20 milliseconds."""

def unpack_kernel(source: Path, target: Path) -> bool:
    """Writes the ELF image that is packed in a bzImage to ``target``.

    Returns:
        Whether ``source`` was a bzImage; an ELF image isn't packed.

    Raises:
        FormatError: It is no kernel, or a damaged one.
        HostError: A file can't be read or written.
    """

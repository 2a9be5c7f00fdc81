"""Bare machines in this process. :mod:`ringfence.lowlevel` wraps this with types of its own."""

from typing import Protocol, final

__all__ = ["Exit", "Machine", "Vcpu", "engines"]

class _Device(Protocol):
    def read(self, offset: int, length: int, /) -> bytes: ...
    def write(self, offset: int, data: bytes, /) -> None: ...

@final
class Exit:
    """Why a vCPU came back. ``kind`` says which of the other fields are set."""

    @property
    def kind(self) -> str:
        """``halt``, ``shutdown``, ``kicked``, ``step``, ``breakpoint``, ``read`` or ``write``."""

    @property
    def space(self) -> str | None:
        """``port`` or ``memory``, for accesses."""

    @property
    def address(self) -> int | None:
        """Of an access or a breakpoint."""

    @property
    def length(self) -> int | None:
        """Bytes of an access."""

    @property
    def data(self) -> bytes | None:
        """What the guest wrote."""

@final
class Vcpu:
    """A vCPU. Any thread may use it, one at a time; only ``kick`` may come while it runs."""

    def run(self) -> Exit:
        """Runs until an exit. Other Python threads go on, and signals are looked at."""

    def kick(self) -> None:
        """Makes the current or next run return, from any thread."""

    def complete_read(self, data: bytes) -> None:
        """Gives the bytes that a read's exit asked for."""

    def registers(self) -> dict[str, int]:
        """All registers that are one number, by name."""

    def segments(self) -> dict[str, tuple[int, int, int, int]]:
        """Segments by name: selector, base, limit, access rights."""

    def set(
        self, registers: dict[str, int], segments: dict[str, tuple[int, int, int, int]]
    ) -> None:
        """Sets what is named and leaves the rest."""

    def read_msrs(self) -> dict[int, int]:
        """The model-specific registers of the state."""

    def set_debug(self, single_step: bool, breakpoints: list[int]) -> None:
        """Stops after each instruction, or at addresses."""

    def translate(self, address: int) -> int | None:
        """A guest virtual address as a physical one; None when nothing is mapped."""

@final
class Machine:
    """RAM, buses and vCPUs without interrupt chips."""

    def __new__(
        cls, engine_name: str, memory_bytes: int, vcpus: int, exit_on_unclaimed: bool
    ) -> Machine: ...
    def vcpu(self, index: int) -> Vcpu:
        """Makes vCPU ``index``, once."""

    def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory."""

    def write(self, address: int, data: bytes) -> None:
        """Copies into guest memory."""

    def place_memory_device(self, start: int, length: int, device: _Device) -> None:
        """Places a Python device in memory space."""

    def place_port_device(self, start: int, length: int, device: _Device) -> None:
        """Places a Python device in port space."""

    def counters(self) -> list[tuple[str, int]]:
        """The engine's live counters."""

def engines() -> list[str]:
    """The engines that a machine can be made of."""

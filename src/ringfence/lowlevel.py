"""Bare machines in this process: registers, memory, exits, single step, devices in Python.

For research on kernels, monitors and processors. A machine here has RAM, a port and a memory bus,
and vCPUs without interrupt chips: HLT comes back, and so does every access that no device claims.
Nothing is jailed: don't run what you don't trust with it.

Example:
    >>> machine = Machine(memory_mib=1)                               # doctest: +SKIP
    >>> machine.write(0x1000, bytes.fromhex("b8 2a 00 f4"))           # mov ax, 42; hlt
    >>> cpu = machine.vcpu()
    >>> cpu.start_real_mode(0x1000)
    >>> cpu.run()
    Halt()
    >>> cpu.registers["rax"]
    42

A device's methods are called while the guest waits: an access costs some microseconds in Python,
where a device in Rust takes some nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ringfence._native import lowlevel as _native
from ringfence._native.host import probe_kvm
from ringfence.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Breakpoint",
    "Device",
    "Exit",
    "Halt",
    "Kicked",
    "Machine",
    "Read",
    "Segment",
    "Shutdown",
    "Step",
    "Vcpu",
    "Write",
    "engines",
]

_MIB = 1 << 20

Space = Literal["port", "memory"]


class Device(Protocol):
    """What the guest reaches through ports or device memory."""

    def read(self, offset: int, length: int, /) -> bytes:
        """The guest reads.

        Args:
            offset: From the start of the device's range.
            length: How many bytes, 1 to 8.

        Returns:
            Exactly ``length`` bytes.
        """

    def write(self, offset: int, data: bytes, /) -> None:
        """The guest writes.

        Args:
            offset: From the start of the device's range.
            data: The bytes, 1 to 8.
        """


@dataclass(frozen=True, slots=True)
class Halt:
    """The guest executed HLT; the next run continues behind it."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A triple fault. The registers are undefined until they are set."""


@dataclass(frozen=True, slots=True)
class Kicked:
    """:meth:`Vcpu.kick` was called."""


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction was executed."""


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A breakpoint was reached; its instruction has not run.

    Args:
        address: Guest virtual address.
    """

    address: int


@dataclass(frozen=True, slots=True)
class Read:
    """The guest reads where no device is, and waits for :meth:`Vcpu.complete_read`.

    Args:
        space: Ports or memory.
        address: In that space.
        length: How many bytes it wants.
    """

    space: Space
    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Write:
    """The guest wrote where no device is.

    Args:
        space: Ports or memory.
        address: In that space.
        data: What it wrote.
    """

    space: Space
    address: int
    data: bytes


Exit = Halt | Shutdown | Kicked | Step | Breakpoint | Read | Write


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment register with its hidden part.

    Args:
        selector: The visible part.
        base: Base address.
        limit: In bytes, granularity applied.
        access: Descriptor bits 40 to 55 without the limit's; bit 16 means unusable.

    Source: SDM 3A §3.4.3; SDM 3C §24.4.1 for the access bits.
    """

    selector: int
    base: int
    limit: int
    access: int


class Vcpu:
    """A virtual CPU. Made by :meth:`Machine.vcpu`.

    Any thread may use it, one at a time; only :meth:`kick` may come while it runs.
    """

    __slots__ = ("_native",)

    def __init__(self, native: _native.Vcpu) -> None:
        self._native = native

    def run(self) -> Exit:
        """Runs the guest until something needs the caller. Other Python threads go on.

        Returns:
            Why it came back.

        Raises:
            StateError: It runs already, or a read waits to be completed.
            GuestError: The guest's code is nothing that this engine can run.
            HostError: The host refused.
            KeyboardInterrupt: Ctrl-C; the guest can be run on.
        """
        return _exit(self._native.run())

    def kick(self) -> None:
        """Makes the current or next :meth:`run` return :class:`Kicked`. For any thread."""
        self._native.kick()

    def complete_read(self, data: bytes) -> None:
        """Gives the guest the bytes that the last :class:`Read` asked for.

        Args:
            data: As many bytes as it asked for.

        Raises:
            StateError: No read waits, or the length differs.
        """
        self._native.complete_read(data)

    @property
    def registers(self) -> dict[str, int]:
        """The registers by name: ``rax`` to ``r15``, ``rip``, ``rflags``, ``cr0`` and so on.

        A copy: see :meth:`set`.
        """
        return self._native.registers()

    @property
    def segments(self) -> dict[str, Segment]:
        """The segments by name: ``cs`` to ``ss``, ``tr`` and ``ldtr``. A copy: see :meth:`set`."""
        return {
            name: Segment(selector=selector, base=base, limit=limit, access=access)
            for name, (selector, base, limit, access) in self._native.segments().items()
        }

    @property
    def msrs(self) -> dict[int, int]:
        """The model-specific registers that belong to the guest's state, by number."""
        return self._native.read_msrs()

    def set(self, *, segments: Mapping[str, Segment] | None = None, **registers: int) -> None:
        """Sets registers and leaves the rest as it is.

        Args:
            segments: Segments by name.
            registers: Registers by name, as in :attr:`registers`.

        Raises:
            ConfigError: There is no such register, or no processor can be in that state.
        """
        native = {name: (s.selector, s.base, s.limit, s.access) for name, s in _items(segments)}
        self._native.set(registers, native)

    def start_real_mode(self, address: int) -> None:
        """Puts the vCPU in real mode with flat segments, about to run the code at ``address``.

        Args:
            address: Below 64 KiB.
        """
        flat = Segment(selector=0, base=0, limit=0xFFFF, access=0x93)
        segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), flat)
        segments["cs"] = Segment(selector=0, base=0, limit=0xFFFF, access=0x9B)
        self.set(segments=segments, cr0=0x10, cr4=0, efer=0, rip=address, rflags=2)

    def set_debug(self, *, single_step: bool = False, breakpoints: Sequence[int] = ()) -> None:
        """Stops after each instruction, or before those at some addresses.

        Args:
            single_step: After each instruction.
            breakpoints: Guest virtual addresses; at most four with the ``kvm`` engine.

        Raises:
            ConfigError: More breakpoints than there are.
            UnsupportedError: The host can't debug guests.
        """
        self._native.set_debug(single_step, list(breakpoints))

    def translate(self, address: int) -> int | None:
        """Where a guest virtual address lies in physical memory now.

        Args:
            address: Guest virtual address.

        Returns:
            The guest physical address; None when nothing is mapped there.
        """
        return self._native.translate(address)


class Machine:
    """RAM, a port and a memory bus, and vCPUs.

    Args:
        engine: One of :func:`engines`, or ``auto``: ``kvm`` where it is measured to be usable, else
            ``bt``, which needs nothing of the host.
        memory_mib: RAM in MiB, from address 0.
        vcpus: How many.
        exit_on_unclaimed: Accesses that no device claims come back from :meth:`Vcpu.run`. Else
            they read as ones and writes are lost, as on a PC.

    Raises:
        ConfigError: No such engine, memory or number of vCPUs.
        UnsupportedError: The host lacks something that the engine needs.
        HostError: The host refused, for instance because ``/dev/kvm`` is missing.
    """

    __slots__ = ("_engine", "_native")

    def __init__(
        self,
        *,
        engine: str = "auto",
        memory_mib: int = 16,
        vcpus: int = 1,
        exit_on_unclaimed: bool = True,
    ) -> None:
        # Negative sizes are no numbers that the native side has a type for.
        memory_bytes = max(memory_mib, 0) * _MIB
        self._engine = _best() if engine == "auto" else engine
        self._native = _native.Machine(self._engine, memory_bytes, max(vcpus, 0), exit_on_unclaimed)

    @property
    def engine(self) -> str:
        """What runs it."""
        return self._engine

    def vcpu(self, index: int = 0) -> Vcpu:
        """Makes a vCPU, in the state after reset.

        Args:
            index: 0 up to the machine's number less one; each once.

        Raises:
            ConfigError: It was made already, or there is no such one.
        """
        return Vcpu(self._native.vcpu(index))

    def read(self, address: int, length: int) -> bytes:
        """Copies out of guest memory.

        Args:
            address: Guest physical address.
            length: How many bytes.

        Raises:
            ConfigError: The range is not all RAM.
        """
        return self._native.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        """Copies into guest memory.

        Args:
            address: Guest physical address.
            data: The bytes.

        Raises:
            ConfigError: The range is not all RAM.
        """
        self._native.write(address, data)

    def add_device(self, space: Space, start: int, length: int, device: Device) -> None:
        """Places a device. An exception in it ends the run that called it, and is raised there.

        Args:
            space: Ports or memory.
            start: First address.
            length: How many addresses.
            device: Its methods are called in the thread that runs the vCPU.

        Raises:
            ConfigError: The range is taken or no range.
        """
        if space == "port":
            self._native.place_port_device(start, length, device)
        else:
            self._native.place_memory_device(start, length, device)

    def counters(self) -> dict[str, int]:
        """The engine's counters since the machine was made."""
        return dict(self._native.counters())


def engines() -> tuple[str, ...]:
    """The engines that a :class:`Machine` can be made of."""
    return tuple(_native.engines())


def _best() -> str:
    return "kvm" if probe_kvm().verdict == "usable" else "bt"


def _items(segments: Mapping[str, Segment] | None) -> list[tuple[str, Segment]]:
    return list(segments.items()) if segments else []


def _exit(native: _native.Exit) -> Exit:
    plain: dict[str, Exit] = {
        "halt": Halt(),
        "shutdown": Shutdown(),
        "kicked": Kicked(),
        "step": Step(),
    }
    if native.kind in plain:
        return plain[native.kind]
    address = native.address
    space: Space = "port" if native.space == "port" else "memory"
    if address is not None:
        if native.kind == "breakpoint":
            return Breakpoint(address)
        if native.kind == "read" and native.length is not None:
            return Read(space, address, native.length)
        if native.kind == "write" and native.data is not None:
            return Write(space, address, native.data)
    message = f"the native module returned an exit of kind {native.kind!r}"
    raise InternalError(message)

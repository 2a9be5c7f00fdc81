"""What :mod:`ringfence.lowlevel` promises, as plain functions.

Run as a program, it calls each with the engine that is named, and says how many passed:
python -m tests.native.lowlevel_checks bt
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence import errors
from ringfence.lowlevel import (
    Breakpoint,
    Halt,
    Kicked,
    Machine,
    Read,
    Segment,
    Shutdown,
    Step,
    Vcpu,
    Write,
    engines,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CODE = 0x1000
PORT_ACCESSES = {"kvm": "exits.pio", "bt": "port_accesses"}
ENGINE = sys.argv[1] if len(sys.argv) > 1 else "auto"


def guest(code: str, *, exit_on_unclaimed: bool = True) -> tuple[Machine, Vcpu]:
    """A real-mode guest with this code, in hexadecimal."""
    machine = Machine(engine=ENGINE, memory_mib=1, exit_on_unclaimed=exit_on_unclaimed)
    machine.write(CODE, bytes.fromhex(code))
    cpu = machine.vcpu()
    cpu.start_real_mode(CODE)
    return machine, cpu


def check_a_guest_computes_and_halts() -> None:
    _, cpu = guest("b8 06 00 bb 07 00 f7 e3 f4")  # mov ax, 6; mov bx, 7; mul bx; hlt
    assert cpu.run() == Halt()
    assert cpu.registers["rax"] == 42
    assert cpu.registers["rip"] == CODE + 9


def check_memory_is_copied_both_ways() -> None:
    machine, cpu = guest("a1 00 20 40 a3 02 20 f4")  # mov ax,[2000]; inc ax; mov [2002],ax; hlt
    machine.write(0x2000, b"\x34\x12")
    assert cpu.run() == Halt()
    assert machine.read(0x2000, 4) == b"\x34\x12\x35\x12"


def check_memory_outside_ram_is_refused() -> None:
    machine, _ = guest("f4")
    for address, length in [(1 << 20, 1), ((1 << 20) - 1, 2), (0, 1 << 21), ((1 << 64) - 1, 1)]:
        error = raises(errors.ConfigError, partial(machine.read, address, length))
        assert f"{address:#x}" in str(error)


def check_accesses_come_back_to_the_caller() -> None:
    _, cpu = guest("ba 00 05 ec ef f4")  # mov dx, 0x500; in al, dx; out dx, ax; hlt
    assert cpu.run() == Read("port", 0x500, 1)
    cpu.complete_read(b"\x5a")
    assert cpu.run() == Write("port", 0x500, b"\x5a\x00")
    assert cpu.run() == Halt()


def check_a_run_while_a_read_waits_is_a_state_error() -> None:
    _, cpu = guest("ba 00 05 ec f4")
    cpu.run()
    raises(errors.StateError, cpu.run)
    raises(errors.StateError, lambda: cpu.complete_read(b"too long"))
    cpu.complete_read(b"\x01")
    assert cpu.run() == Halt()


class Adder:
    """Remembers the sum of what is written and reads it back."""

    def __init__(self) -> None:
        self.sum = 0
        self.seen: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.seen.append((offset, length))
        return self.sum.to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> None:
        self.seen.append((offset, len(data)))
        self.sum += int.from_bytes(data, "little")


def check_a_port_device_in_python_works() -> None:
    machine, cpu = guest("ba 03 03 b8 05 00 ef ef ed f4")  # out twice, in, hlt
    adder = Adder()
    machine.add_device("port", 0x300, 8, adder)
    assert cpu.run() == Halt()
    assert cpu.registers["rax"] == 10
    assert adder.seen == [(3, 2)] * 3
    assert machine.counters()[PORT_ACCESSES[machine.engine]] == 3


def check_a_memory_device_in_python_works() -> None:
    # mov ax, 0xffff; mov ds, ax; mov byte [0x20], 7 (linear 0x100010); mov bl, [0x20]; hlt
    machine, cpu = guest("b8 ff ff 8e d8 c6 06 20 00 07 8a 1e 20 00 f4")
    adder = Adder()
    machine.add_device("memory", 0x100000, 0x1000, adder)
    assert cpu.run() == Halt()
    assert cpu.registers["rbx"] == 7
    assert adder.seen == [(0x10, 1), (0x10, 1)]


def check_an_exception_in_a_device_is_raised_by_the_run() -> None:
    class Broken:
        def read(self, offset: int, length: int) -> bytes:
            message = f"offset {offset}"
            raise LookupError(message)

        def write(self, offset: int, data: bytes) -> None:
            raise AssertionError

    machine, cpu = guest("ba 00 03 ec f4")
    machine.add_device("port", 0x300, 1, Broken())
    error = raises(LookupError, cpu.run)
    assert "offset 0" in str(error)


def check_a_device_answer_of_the_wrong_length_is_said() -> None:
    class Short:
        def read(self, offset: int, length: int) -> bytes:
            return b""

        def write(self, offset: int, data: bytes) -> None:
            raise AssertionError

    machine, cpu = guest("ba 00 03 ed f4")
    machine.add_device("port", 0x300, 4, Short())
    error = raises(errors.ConfigError, cpu.run)
    assert "asked for 2 bytes and returned 0" in str(error)


def check_devices_do_not_overlap() -> None:
    machine, _ = guest("f4")
    machine.add_device("port", 0x300, 8, Adder())
    raises(errors.ConfigError, lambda: machine.add_device("port", 0x304, 8, Adder()))


def check_single_step_and_breakpoints() -> None:
    _, cpu = guest("90 90 90 90 f4")
    cpu.set_debug(single_step=True)
    assert cpu.run() == Step()
    assert cpu.registers["rip"] == CODE + 1
    cpu.set_debug(breakpoints=[CODE + 3])
    assert cpu.run() == Breakpoint(CODE + 3)
    assert cpu.run() == Halt()


def check_kvm_has_the_processors_four_breakpoints() -> None:
    _, cpu = guest("f4")
    raises(errors.ConfigError, lambda: cpu.set_debug(breakpoints=range(5)))


def check_registers_can_be_set_by_name() -> None:
    _, cpu = guest("f4")
    cpu.set(rbx=0x1234, r15=1 << 63, dr0=0x77)
    got = cpu.registers
    assert (got["rbx"], got["r15"], got["dr0"]) == (0x1234, 1 << 63, 0x77)
    assert 'no register "ebx"' in str(raises(errors.ConfigError, lambda: cpu.set(ebx=1)))
    raises(OverflowError, lambda: cpu.set(rax=-1))
    data = Segment(selector=0x200, base=0x2000, limit=0xFFFF, access=0x93)
    cpu.set(segments={"fs": data})
    assert cpu.segments["fs"] == data


def check_a_triple_fault_is_a_shutdown() -> None:
    _, cpu = guest("0f 0b")
    cpu.set(idt_limit=0)
    assert cpu.run() == Shutdown()


def check_a_kick_from_another_thread_while_python_goes_on() -> None:
    _, cpu = guest("eb fe")  # jmp $
    counted = 0

    def count_then_kick() -> None:
        nonlocal counted
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            counted += 1
        cpu.kick()

    thread = threading.Thread(target=count_then_kick)
    thread.start()
    assert cpu.run() == Kicked()
    thread.join()
    assert counted > 100, "the other thread ran while the guest did"


def check_a_running_vcpu_refuses_other_calls() -> None:
    machine, cpu = guest("ba 00 00 ee eb fe")
    refused: list[BaseException] = []

    class Asking:
        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, offset: int, data: bytes) -> None:
            refused.append(raises(errors.StateError, lambda: cpu.registers))
            cpu.kick()

    machine.add_device("port", 0, 1, Asking())
    assert cpu.run() == Kicked()
    assert "running" in str(refused[0])


def check_ctrl_c_ends_an_endless_guest() -> None:
    _, cpu = guest("eb fe")
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    raises(KeyboardInterrupt, cpu.run)
    timer.join()
    threading.Timer(0.1, cpu.kick).start()
    assert cpu.run() == Kicked()


def check_floating_bus_where_nothing_exits() -> None:
    _, cpu = guest("ba 00 05 ed f4", exit_on_unclaimed=False)
    assert cpu.run() == Halt()
    assert cpu.registers["rax"] == 0xFFFF


def check_translate_follows_the_mode() -> None:
    _, cpu = guest("f4")
    assert cpu.translate(0x1234) == 0x1234


def check_impossible_setups_are_refused() -> None:
    raises(errors.ConfigError, lambda: Machine(engine=ENGINE, memory_mib=0))
    raises(errors.ConfigError, lambda: Machine(engine=ENGINE, vcpus=0))
    raises(errors.ConfigError, lambda: Machine(engine=ENGINE, vcpus=33))
    machine = Machine(engine=ENGINE, memory_mib=1)
    machine.vcpu(0)
    raises(errors.ConfigError, lambda: machine.vcpu(0))


def check_machines_are_freed() -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        check_a_guest_computes_and_halts()
    gc.collect()
    assert len(list(descriptors.iterdir())) <= before


def raises(kind: type[BaseException], call: Callable[[], object]) -> BaseException:
    """The exception that ``call`` raises, which must be of this kind."""
    try:
        call()
    except kind as error:
        return error
    message = f"{kind.__name__} was not raised"
    raise AssertionError(message)


def main() -> int:
    """Runs every check and says how it went."""
    others = {f"check_{name}_" for name in engines()} - {f"check_{Machine(engine=ENGINE).engine}_"}
    checks = {
        name: call
        for name, call in globals().items()
        if name.startswith("check_") and not name.startswith(tuple(others))
    }
    failed = 0
    for name, check in checks.items():
        try:
            check()
        except BaseException:
            failed += 1
            sys.stdout.write(f"{name} failed\n{traceback.format_exc()}")
    sys.stdout.write(f"{len(checks) - failed} passed, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

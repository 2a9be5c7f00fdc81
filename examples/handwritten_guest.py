"""Runs a guest that was written by hand, with a device written in Python.

The guest prints a text through a port, one character at a time, then halts. It needs no /dev/kvm:
python examples/handwritten_guest.py
"""

from __future__ import annotations

from ringfence.lowlevel import Halt, Machine

TEXT = b"hello from ring 0\n"
GUEST = bytes.fromhex(
    "be 20 10"  # mov si, 0x1020: where the text is
    "b9 12 00"  # mov cx, 18: its length
    "ba f8 03"  # mov dx, 0x3f8
    "f3 6e"  # rep outsb
    "f4"  # hlt
)


class Console:
    """A device that prints what it is given."""

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write(self, offset: int, data: bytes) -> None:
        print(data.decode(), end="")


machine = Machine(memory_mib=1)
machine.write(0x1000, GUEST)
machine.write(0x1020, TEXT)
machine.add_device("port", 0x3F8, 1, Console())
cpu = machine.vcpu()
cpu.start_real_mode(0x1000)
assert cpu.run() == Halt()
print(f"the guest stopped at {cpu.registers['rip']:#x}")

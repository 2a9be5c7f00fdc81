"""The kernel's interpreter of packet filters, as far as filters of system calls use it.

Source: linux/filter.h, linux/seccomp.h.
"""

from __future__ import annotations

__all__ = ["simulate"]

_LOAD, _RETURN, _JUMP, _AND = 0x20, 0x06, 0x05, 0x54
_EQUAL, _GREATER, _GREATER_EQUAL = 0x15, 0x25, 0x35
_LOW = 0xFFFF_FFFF


def simulate(
    program: list[tuple[int, int, int, int]], audit: int, number: int, arguments: list[int]
) -> int:
    """What a filter answers to one call, by the rules of the kernel's interpreter.

    Raises:
        ValueError: The program runs off its end.
    """
    words = [number, audit, 0, 0]
    for argument in (arguments + [0] * 6)[:6]:
        words += [argument & _LOW, argument >> 32 & _LOW]
    at = accumulator = 0
    while at < len(program):
        code, when_true, when_false, constant = program[at]
        at += 1
        if code == _RETURN:
            return constant
        if code == _LOAD:
            accumulator = words[constant // 4]
        elif code == _AND:
            accumulator &= constant
        elif code == _JUMP:
            at += constant
        else:
            holds = {
                _EQUAL: accumulator == constant,
                _GREATER: accumulator > constant,
                _GREATER_EQUAL: accumulator >= constant,
            }[code]
            at += when_true if holds else when_false
    message = "the filter has no end"
    raise ValueError(message)

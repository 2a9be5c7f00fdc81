"""System call filters: the specification's rules as a program of the kernel's packet filter.

For each architecture a search tree over the call's number leads to the call's checks; calls that
are decided by their number alone are joined into ranges, so that a profile of 400 names costs a
dozen comparisons a call. The kernel (5.11) remembers which numbers are always allowed.

Source: OCI runtime-spec, config-linux.md, "Seccomp"; linux/seccomp.h, linux/audit.h. Where rules
name one argument twice they are alternatives, as in runc.
"""

from __future__ import annotations

import os
import struct

from ringfence.container import syscalls
from ringfence.errors import ConfigError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields

    Instruction = tuple[int, int, int, int]
    # Argument, comparison, value, second value (the value of a masked comparison).
    Condition = tuple[int, str, int, int]
    # A way through: its conditions, all of which must hold, and what it leads to.
    Rule = tuple[list[Condition], int]

__all__ = [
    "ACTIONS",
    "ARCHITECTURES",
    "NEW_LISTENER",
    "OPERATORS",
    "compile_filter",
    "packed",
]

ACTIONS = {
    "SCMP_ACT_KILL": 0x0000_0000,
    "SCMP_ACT_KILL_THREAD": 0x0000_0000,
    "SCMP_ACT_KILL_PROCESS": 0x8000_0000,
    "SCMP_ACT_TRAP": 0x0003_0000,
    "SCMP_ACT_ERRNO": 0x0005_0000,
    "SCMP_ACT_TRACE": 0x7FF0_0000,
    "SCMP_ACT_NOTIFY": 0x7FC0_0000,
    "SCMP_ACT_LOG": 0x7FFC_0000,
    "SCMP_ACT_ALLOW": 0x7FFF_0000,
}
OPERATORS = tuple(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
_WITH_ERRNO = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
_EPERM, _ENOSYS = 1, 38
_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}
_NOTIFY, NEW_LISTENER = "SCMP_ACT_NOTIFY", 8
_X32 = 0x4000_0000
# Name: the audit number, the table, a bit in every number.
ARCHITECTURES = {
    "SCMP_ARCH_X86_64": (0xC000_003E, syscalls.X86_64, 0),
    "SCMP_ARCH_X32": (0xC000_003E, syscalls.X86_64, _X32),
    "SCMP_ARCH_X86": (0x4000_0003, syscalls.I386, 0),
    "SCMP_ARCH_AARCH64": (0xC000_00B7, syscalls.AARCH64, 0),
}
_NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}

_LOAD, _RETURN, _JUMP, _AND = 0x20, 0x06, 0x05, 0x54
_EQUAL, _GREATER, _GREATER_EQUAL = 0x15, 0x25, 0x35
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_LOW = 0xFFFF_FFFF
_LONGEST = 4096


def _action(name: str, errno: int | None, place: str) -> int:
    if name not in ACTIONS:
        message = f"{place}: there is no action {name!r}"
        raise ConfigError(message)
    value = ACTIONS[name]
    if name in _WITH_ERRNO:
        value |= (_EPERM if errno is None else errno) & 0xFFFF
    return value


def _rules(profile: Fields) -> dict[str, list[Rule]]:
    """Each call's ways, in the profile's order."""
    found: dict[str, list[Rule]] = {}
    for entry in profile.tables("syscalls"):
        action = _action(entry.text("action"), entry.optional_integer("errnoRet"), entry.place)
        if entry.text("action") == _NOTIFY and "write" in entry.texts("names"):
            # By it the setup says that there is somebody to ask.
            message = "SCMP_ACT_NOTIFY cannot be used for the write syscall"
            raise ConfigError(message)
        conditions: list[Condition] = [
            (
                argument.integer("index"),
                argument.text("op"),
                argument.integer("value") & (2**64 - 1),
                argument.integer("valueTwo") & (2**64 - 1),
            )
            for argument in entry.tables("args")
        ]
        indexes = [condition[0] for condition in conditions]
        if any(index not in range(6) for index in indexes):
            message = f"{entry.place}.args: a system call has arguments 0 to 5"
            raise ConfigError(message)
        ways: list[Rule]
        if len(set(indexes)) < len(indexes):
            ways = [([condition], action) for condition in conditions]
        else:
            ways = [(conditions, action)]
        for name in entry.texts("names"):
            found.setdefault(name, []).extend(ways)
    return found


def compile_filter(profile: Fields, machine: str = "") -> tuple[int, list[Instruction]]:
    """A profile as a filter: the flags of its installation, and its instructions.

    Args:
        profile: ``linux.seccomp``.
        machine: The host's architecture as uname says it; empty: this host's.

    Raises:
        ConfigError: The profile is malformed or too long for the kernel.
        UnsupportedError: It asks for what isn't there.
    """
    machine = machine or os.uname().machine
    if machine not in _NATIVE:
        message = f"system call filters for {machine} aren't there"
        raise UnsupportedError(message)
    native = _NATIVE[machine]
    if profile.text("defaultAction") == _NOTIFY:
        message = "SCMP_ACT_NOTIFY cannot be used as default action"
        raise ConfigError(message)
    default = _action(
        profile.text("defaultAction"), profile.optional_integer("defaultErrnoRet"), "seccomp"
    )
    wanted = [native, *profile.texts("architectures")]
    rules = _rules(profile)
    by_audit: dict[int, list[str]] = {}
    for name in dict.fromkeys(wanted):
        if name in ARCHITECTURES:
            by_audit.setdefault(ARCHITECTURES[name][0], []).append(name)
    code = _Code()
    code.put(_LOAD, _ARCH_AT)
    for audit, names in by_audit.items():
        code.branch(_EQUAL, audit, f"arch {audit}", "")
        code.pending.append((f"arch {audit}", names))
    # A call of an architecture that isn't named: nothing of it was thought of.
    code.put(_RETURN, ACTIONS["SCMP_ACT_KILL_PROCESS"] if default & 0x7FFF_0000 == 0 else default)
    for label, names in code.pending:
        code.label(label)
        _architecture(code, names, rules, default)
    asks = any(action == ACTIONS[_NOTIFY] for ways in rules.values() for _, action in ways)
    flags = NEW_LISTENER if asks else 0
    for name in profile.texts("flags"):
        if name not in _FLAGS:
            message = f"seccomp.flags: there is no flag {name!r}"
            raise ConfigError(message)
        flags |= _FLAGS[name]
    program = code.resolve()
    if len(program) > _LONGEST:
        message = f"the seccomp profile makes {len(program)} instructions; {_LONGEST} are the most"
        raise ConfigError(message)
    return flags & ~1, program


def packed(profile: Fields) -> tuple[int, str]:
    """A filter's flags, and its instructions as the kernel's bytes in hexadecimal, as plans have it.

    Numbers one by one would be most of a plan's text, written and read again for each container.

    Raises:
        ConfigError: See :func:`compile_filter`, and so the next.
        UnsupportedError: It asks for what isn't there.
    """
    flags, program = compile_filter(profile)
    words = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    return flags, words.hex()


class _Code:
    """Instructions with labels; every jump can reach as far as it must."""

    def __init__(self) -> None:
        self.items: list[tuple[int, int, str, str]] = []
        self.labels: dict[str, int] = {}
        self.pending: list[tuple[str, list[str]]] = []
        self._count = 0

    def put(self, code: int, constant: int) -> None:
        self.items.append((code, constant, "", ""))

    def branch(self, code: int, constant: int, when_true: str, when_false: str) -> None:
        """A comparison; an empty label goes on with what follows."""
        self.items.append((code, constant, when_true, when_false))

    def label(self, name: str) -> None:
        self.labels[name] = len(self.items)

    def fresh(self) -> str:
        self._count += 1
        return f"l{self._count}"

    def resolve(self) -> list[Instruction]:
        """The program. A comparison reaches 255 instructions; further ones go by a jump."""
        places: list[int] = []
        at = 0
        for _code, _constant, when_true, when_false in self.items:
            places.append(at)
            at += 1 + bool(when_true) + bool(when_false)
        places.append(at)
        program: list[Instruction] = []
        for code, constant, when_true, when_false in self.items:
            here = len(program)
            if not when_true and not when_false:
                program.append((code, 0, 0, constant))
                continue
            jumps = [name for name in (when_true, when_false) if name]
            true_at = 0 if when_true else len(jumps)
            false_at = len(jumps) - 1 if when_false else len(jumps)
            program.append((code, true_at, false_at, constant))
            for index, name in enumerate(jumps):
                program.append((_JUMP, 0, 0, places[self.labels[name]] - (here + 1 + index) - 1))
        return program


def _architecture(
    code: _Code, names: list[str], rules: dict[str, list[Rule]], default: int
) -> None:
    ways: dict[int, list[Rule]] = {}
    newest = 0
    for name in names:
        _audit, table, bit = ARCHITECTURES[name]
        for call, list_ in rules.items():
            number = table.get(call)
            if number is not None:
                ways.setdefault(number | bit, []).extend(list_)
                newest = max(newest, number)
    segments = _segments(ways, names, default, newest)
    code.put(_LOAD, _NUMBER_AT)
    bodies: list[tuple[str, list[Rule]]] = []
    ends: dict[int, str] = {}
    _tree(code, segments, bodies, ends, default)
    for label, list_ in bodies:
        code.label(label)
        _body(code, list_, default, ends)
    for action, label in ends.items():
        code.label(label)
        code.put(_RETURN, action)


def _segments(
    ways: dict[int, list[Rule]], names: list[str], default: int, newest: int
) -> list[tuple[int, list[Rule]]]:
    """Ranges of numbers by their first, each with its rules."""
    plain: list[Rule] = [([], default)]
    # A call younger than the profile must look as on a kernel that lacks it: programs then try
    # the older way, while a refusal would end them.
    refuses = default & 0xFFFF_0000 == ACTIONS["SCMP_ACT_ERRNO"]
    unknown: list[Rule] = [([], ACTIONS["SCMP_ACT_ERRNO"] | _ENOSYS)] if refuses else plain
    table: dict[int, list[Rule]] = {0: plain}
    for number, list_ in sorted(ways.items()):
        table[number] = _shortened(list_, default)
        table.setdefault(number + 1, plain)
    table[newest + 1] = unknown
    if any(ARCHITECTURES[name][2] for name in names):
        table.setdefault(_X32, plain)
    elif 0xC000_003E in (ARCHITECTURES[name][0] for name in names):
        # The calls of the x32 interface are other calls; none was allowed.
        table[_X32] = plain
    merged: list[tuple[int, list[Rule]]] = []
    for number in sorted(table):
        list_ = table[number]
        if not merged or merged[-1][1] != list_:
            merged.append((number, list_))
    return merged


def _shortened(ways: list[Rule], default: int) -> list[Rule]:
    """The ways up to the first that always holds; alone it decides by the number."""
    for index, (conditions, action) in enumerate(ways):
        if not conditions:
            others = [way for way in ways[:index] if way[1] != action]
            return [*others, ([], action)]
    return [*ways, ([], default)]


def _tree(
    code: _Code,
    segments: list[tuple[int, list[Rule]]],
    bodies: list[tuple[str, list[Rule]]],
    ends: dict[int, str],
    default: int,
) -> None:
    """A search over the segments' first numbers; the number is in the accumulator."""
    if len(segments) == 1:
        rules = segments[0][1]
        if len(rules) == 1 and not rules[0][0]:
            code.put(_RETURN, rules[0][1])
            return
        label = code.fresh()
        bodies.append((label, rules))
        # Always taken: no number is less than 0.
        code.branch(_GREATER_EQUAL, 0, label, "")
        return
    middle = len(segments) // 2
    right = code.fresh()
    code.branch(_GREATER_EQUAL, segments[middle][0], right, "")
    _tree(code, segments[:middle], bodies, ends, default)
    code.label(right)
    _tree(code, segments[middle:], bodies, ends, default)


def _body(code: _Code, rules: list[Rule], default: int, ends: dict[int, str]) -> None:
    for conditions, action in rules:
        missed = code.fresh()
        for condition in conditions:
            _condition(code, condition, missed)
        end = ends.setdefault(action, code.fresh())
        if not conditions:
            code.put(_RETURN, action)
        else:
            code.branch(_GREATER_EQUAL, 0, end, "")
        code.label(missed)
    if rules[-1][0]:
        code.put(_RETURN, default)


def _condition(code: _Code, condition: Condition, missed: str) -> None:
    """Falls through when the condition holds. Arguments are compared in two halves of 32 bits."""
    index, operation, value, second = condition
    low_at, high_at = _ARGUMENTS_AT + index * 8, _ARGUMENTS_AT + index * 8 + 4
    high, low = value >> 32, value & _LOW
    if operation == "SCMP_CMP_MASKED_EQ":
        code.put(_LOAD, high_at)
        code.put(_AND, high)
        code.branch(_EQUAL, second >> 32, "", missed)
        code.put(_LOAD, low_at)
        code.put(_AND, low)
        code.branch(_EQUAL, second & _LOW, "", missed)
        return
    holds = code.fresh()
    code.put(_LOAD, high_at)
    if operation == "SCMP_CMP_EQ":
        code.branch(_EQUAL, high, "", missed)
        code.put(_LOAD, low_at)
        code.branch(_EQUAL, low, "", missed)
    elif operation == "SCMP_CMP_NE":
        code.branch(_EQUAL, high, "", holds)
        code.put(_LOAD, low_at)
        code.branch(_EQUAL, low, missed, "")
    elif operation in {"SCMP_CMP_GT", "SCMP_CMP_GE"}:
        code.branch(_GREATER, high, holds, "")
        code.branch(_EQUAL, high, "", missed)
        code.put(_LOAD, low_at)
        code.branch(_GREATER if operation[-1] == "T" else _GREATER_EQUAL, low, "", missed)
    elif operation in {"SCMP_CMP_LT", "SCMP_CMP_LE"}:
        code.branch(_GREATER, high, missed, "")
        code.branch(_EQUAL, high, "", holds)
        code.put(_LOAD, low_at)
        code.branch(_GREATER_EQUAL if operation[-1] == "T" else _GREATER, low, missed, "")
    else:
        message = f"seccomp: there is no comparison {operation!r}"
        raise ConfigError(message)
    code.label(holds)

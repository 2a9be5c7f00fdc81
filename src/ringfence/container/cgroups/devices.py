"""Which devices a container may use: rules of the specification, for both versions.

Version 1 takes rules as text. Version 2 takes a program that the kernel asks: the last rule that
fits decides, so the program tries them from the last to the first.

Source: OCI runtime-spec, config-linux.md, "Allowed Device list"; linux/bpf.h.
"""

from __future__ import annotations

import struct

from ringfence.container.cgroups import files
from ringfence.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.cgroups.group import Group
    from ringfence.container.fields import Fields

__all__ = ["DEFAULT_NODES", "Rule", "allow_first_version", "apply", "program", "rules"]

# Allow, type, major, minor, access; -1 stands for every number.
Rule = tuple[bool, str, int, int, str]

# Path, major, minor: what every container has.
DEFAULT_NODES = (
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
)
# Making nodes is harmless where using them is not allowed; terminals are each container's own.
_ALWAYS: tuple[Rule, ...] = (
    (True, "c", -1, -1, "m"),
    (True, "b", -1, -1, "m"),
    *((True, "c", major, minor, "rwm") for _path, major, minor in DEFAULT_NODES),
    (True, "c", 136, -1, "rwm"),
    (True, "c", 5, 2, "rwm"),
)
_TYPES = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}
_EINVAL, _EPERM = 22, 1


def rules(resources: Fields) -> list[Rule]:
    """The rules of a document, with those that every container needs at the end.

    Raises:
        ConfigError: A rule has an unknown type or access.
    """
    found: list[Rule] = []
    for entry in resources.tables("devices"):
        kind = entry.text("type") or "a"
        asked = entry.text("access") or "rwm"
        # As in runc, letters that mean nothing are no mistake.
        access = "".join(letter for letter in asked if letter in _ACCESS)
        if kind not in {"a", "b", "c"} or not access:
            message = f"{entry.place}: no device rule of type {kind!r} and access {asked!r}"
            raise ConfigError(message)
        major, minor = entry.integer("major", -1), entry.integer("minor", -1)
        found.append((entry.flag("allow"), kind, major, minor, access))
    return [*found, *_ALWAYS]


def _first_text(rule: Rule) -> str:
    _allow, kind, major, minor, access = rule
    if kind == "a" and major == minor == -1:
        return "a"
    numbers = [str(number) if number >= 0 else "*" for number in (major, minor)]
    return f"{kind} {':'.join(numbers)} {access}"


def allow_first_version(path: str, wanted: list[Rule]) -> None:
    """Writes rules to a version 1 cgroup.

    Raises:
        HostError: The kernel refused one.
    """
    for rule in wanted:
        text = _first_text(rule)
        name = "devices.allow" if rule[0] else "devices.deny"
        try:
            files.write(f"{path}/{name}", text)
        except HostError as error:
            # "Everything" can't be taken from a cgroup that has others below it; what the cgroup
            # above doesn't have can't be given.
            if not (text == "a" and error.errno == _EINVAL):
                raise


def apply(group: Group, wanted: list[Rule]) -> dict[str, object]:
    """Gives a cgroup its rules; returns what is left for the setup program to do, as a plan says it.

    Raises:
        HostError: The kernel refused one.
    """
    if group.rootless:
        # Nobody may say it but root; nodes of devices can't be made in a user namespace either.
        return {}
    place = group.directory("devices")
    if place is not None:
        allow_first_version(place, wanted)
        return {}
    return {"device_program": [word for (word,) in struct.iter_unpack("<Q", program(wanted))]}


def _instruction(code: int, registers: int = 0, offset: int = 0, constant: int = 0) -> bytes:
    return struct.pack("<BBhi", code, registers, offset, constant)


def _rule_program(rule: Rule) -> bytes:
    """One rule: falls through when it doesn't fit, returns 1 or 0 when it does.

    Registers: 2 type, 3 access, 4 major, 5 minor.
    """
    allow, kind, major, minor, access = rule
    mask = sum(_ACCESS[letter] for letter in access)
    verdict = _instruction(0xB7, 0, 0, int(allow)) + _instruction(0x95)
    tests: list[tuple[int, int, int]] = []
    if kind != "a":
        tests.append((0x55, 2, _TYPES[kind]))
    if major >= 0:
        tests.append((0x55, 4, major))
    if minor >= 0:
        tests.append((0x55, 5, minor))
    body: list[tuple[bytes, int, int, int]] = []
    if mask != 7:
        # Register 1: what is asked of this rule. An allowing rule must cover all of it.
        body.append((_instruction(0xBC, 0x31) + _instruction(0x54, 1, 0, mask), 0, 0, 0))
        body.append((b"", 0x5D, 0x31, 0) if allow else (b"", 0x15, 1, 0))
    for code, register, constant in tests:
        body.append((b"", code, register, constant))
    sizes = [len(raw) // 8 if raw else 1 for raw, *_rest in body]
    total = sum(sizes) + 2
    out, at = b"", 0
    for (raw, code, registers, constant), size in zip(body, sizes, strict=True):
        at += size
        out += raw or _instruction(code, registers, total - at, constant)
    return out + verdict


def program(wanted: list[Rule]) -> bytes:
    """The version 2 program: type ``BPF_PROG_TYPE_CGROUP_DEVICE``, 8 bytes an instruction."""
    head = b"".join(
        (
            _instruction(0x61, 0x12),  # r2 = type | access << 16
            _instruction(0xBC, 0x23),  # r3 = r2
            _instruction(0x54, 2, 0, 0xFFFF),
            _instruction(0x74, 3, 0, 16),
            _instruction(0x61, 0x14, 4),  # r4 = major
            _instruction(0x61, 0x15, 8),  # r5 = minor
        )
    )
    body = b""
    for rule in reversed(wanted):
        body += _rule_program(rule)
        if rule[1] == "a" and rule[2] == rule[3] == -1 and set(rule[4]) == set("rwm"):
            # It fits always, and the kernel refuses programs of which parts can't be reached.
            return head + body
    return head + body + _instruction(0xB7, 0, 0, 0) + _instruction(0x95)

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ringfence.container.fields import Fields
from ringfence.container.seccomp import compile_filter
from ringfence.container.syscalls import AARCH64, I386, X86_64
from ringfence.errors import ConfigError, UnsupportedError
from tests.framework.filters import simulate

if TYPE_CHECKING:
    from collections.abc import Mapping

AUDIT_X86_64 = 0xC000_003E
AUDIT_I386 = 0x4000_0003
ALLOW = 0x7FFF_0000
KILL_PROCESS = 0x8000_0000


def errno(number: int) -> int:
    return 0x0005_0000 | number


def rule(
    names: list[str], action: str, args: list[dict[str, object]] | None = None, **more: object
) -> dict[str, object]:
    return {"names": names, "action": action, "args": args or [], **more}


def answers(
    profile: Mapping[str, object],
    call: int,
    arguments: list[int] | None = None,
    audit: int = AUDIT_X86_64,
) -> int:
    program = compile_filter(Fields(dict(profile), "seccomp"), "x86_64")[1]
    assert isinstance(program, list)
    return simulate(program, audit, call, arguments or [])


def test_names_that_are_listed_get_their_action_and_others_the_default() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [rule(["read", "write", "setxattrat"], "SCMP_ACT_ALLOW")],
    }

    assert answers(profile, X86_64["read"]) == ALLOW
    assert answers(profile, X86_64["write"]) == ALLOW
    assert answers(profile, X86_64["mount"]) == errno(1)


def test_every_call_of_a_long_profile_gets_its_own_answer() -> None:
    allowed = sorted(X86_64)[::2]
    profile = {
        "defaultAction": "SCMP_ACT_KILL_PROCESS",
        "syscalls": [rule(allowed, "SCMP_ACT_ALLOW")],
    }
    program = compile_filter(Fields(profile), "x86_64")[1]
    assert isinstance(program, list)

    for name, number in X86_64.items():
        wanted = ALLOW if name in allowed else KILL_PROCESS
        assert simulate(program, AUDIT_X86_64, number, []) == wanted, name


def test_calls_younger_than_the_profile_look_as_on_an_older_kernel() -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule(["clone3"], "SCMP_ACT_ALLOW")]}

    assert answers(profile, X86_64["clone3"] + 1) == errno(38)
    assert answers(profile, X86_64["mount"]) == errno(1)


@pytest.mark.parametrize(
    ("operation", "value", "second", "holds", "fails"),
    [
        ("SCMP_CMP_EQ", 5 << 32 | 7, 0, [5 << 32 | 7], [7, 5 << 32, 6 << 32 | 7]),
        ("SCMP_CMP_NE", 40, 0, [0, 41, 1 << 32 | 40], [40]),
        ("SCMP_CMP_GT", 1 << 32, 0, [1 << 32 | 1, 2 << 32], [0, 1 << 32, 0xFFFF_FFFF]),
        ("SCMP_CMP_GE", 1 << 32, 0, [1 << 32, 2 << 32], [0, 0xFFFF_FFFF]),
        ("SCMP_CMP_LT", 1 << 32 | 5, 0, [0, 1 << 32 | 4, 0xFFFF_FFFF], [1 << 32 | 5, 2 << 32]),
        ("SCMP_CMP_LE", 1 << 32 | 5, 0, [0, 1 << 32 | 5], [1 << 32 | 6, 2 << 32]),
        ("SCMP_CMP_MASKED_EQ", 0x7E02_0000, 0, [0, 0x11, 1 << 40], [0x1000_0000, 0x0002_0000]),
    ],
)
def test_arguments_are_compared_over_all_their_64_bits(
    operation: str, value: int, second: int, holds: list[int], fails: list[int]
) -> None:
    argument: dict[str, object] = {"index": 2, "op": operation, "value": value, "valueTwo": second}
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [rule(["clone"], "SCMP_ACT_ALLOW", [argument])],
    }

    for given in holds:
        assert answers(profile, X86_64["clone"], [0, 0, given]) == ALLOW, hex(given)
    for given in fails:
        assert answers(profile, X86_64["clone"], [0, 0, given]) == errno(1), hex(given)


def test_conditions_on_two_arguments_must_both_hold() -> None:
    both: list[dict[str, object]] = [
        {"index": 0, "op": "SCMP_CMP_EQ", "value": 1},
        {"index": 1, "op": "SCMP_CMP_EQ", "value": 2},
    ]
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [rule(["socket"], "SCMP_ACT_ALLOW", both)],
    }

    assert answers(profile, X86_64["socket"], [1, 2]) == ALLOW
    assert answers(profile, X86_64["socket"], [1, 3]) == errno(1)
    assert answers(profile, X86_64["socket"], [3, 2]) == errno(1)


def test_conditions_on_one_argument_are_alternatives() -> None:
    either: list[dict[str, object]] = [
        {"index": 0, "op": "SCMP_CMP_EQ", "value": 0},
        {"index": 0, "op": "SCMP_CMP_EQ", "value": 8},
    ]
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [rule(["personality"], "SCMP_ACT_ALLOW", either)],
    }

    assert [answers(profile, X86_64["personality"], [n]) for n in (0, 8, 4)] == [
        ALLOW,
        ALLOW,
        errno(1),
    ]


def test_an_errno_of_a_rule_is_kept() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [rule(["clone3"], "SCMP_ACT_ERRNO", errnoRet=38)],
    }

    assert answers(profile, X86_64["clone3"]) == errno(38)


def test_the_other_width_of_the_architecture_has_its_own_numbers() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [rule(["mount", "openat2"], "SCMP_ACT_ALLOW")],
    }

    assert answers(profile, I386["mount"], audit=AUDIT_I386) == ALLOW
    assert answers(profile, X86_64["mount"], audit=AUDIT_I386) == errno(1)
    assert answers(profile, 0x4000_0000 | X86_64["mount"]) == ALLOW


def test_calls_of_an_unnamed_architecture_are_refused() -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule(["read"], "SCMP_ACT_ALLOW")]}

    assert answers(profile, 3, audit=AUDIT_I386) == errno(1)
    assert answers(profile, 0x4000_0000) == errno(1)


def test_tables_agree_with_numbers_that_everybody_knows() -> None:
    assert (X86_64["read"], X86_64["execve"], X86_64["clone3"]) == (0, 59, 435)
    assert (I386["exit"], I386["read"], I386["clone3"]) == (1, 3, 435)
    assert (AARCH64["openat"], AARCH64["read"], AARCH64["clone3"]) == (56, 63, 435)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ConfigError, match="SCMP_ACT_NOTIFY"):
        compile_filter(Fields({"defaultAction": "SCMP_ACT_NOTIFY"}), "x86_64")
    asking = {
        "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule(["write"], "SCMP_ACT_NOTIFY")],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="write"):
        compile_filter(Fields(asking), "x86_64")
    with pytest.raises(ConfigError, match="SCMP_ACT_SIGH"):
        compile_filter(Fields({"defaultAction": "SCMP_ACT_SIGH"}), "x86_64")
    with pytest.raises(UnsupportedError, match="m68k"):
        compile_filter(Fields({"defaultAction": "SCMP_ACT_ALLOW"}), "m68k")

"""Parsing at the edge: JSON, fields, options, mounts, limits, device rules."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.container import lean_json
from ringfence.container.cgroups import devices, limits
from ringfence.container.fields import Fields
from ringfence.container.mounts import compile_mount, split_options
from ringfence.container.oci.options import parse
from ringfence.container.scheduling import compile_process, processors
from ringfence.container.spec import compile_process as compile_whole
from ringfence.container.spec import namespace_paths
from ringfence.container.state import check_id
from ringfence.errors import ConfigError, FormatError, UnsupportedError

_LEAN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import ringfence.container.oci.main, ringfence.container.oci.lifecycle, ringfence.container.waiting
heavy = {"typing", "enum", "re", "json", "collections", "signal", "pathlib", "dataclasses", "subprocess"}
print(sorted(heavy & set(sys.modules)))
"""


def test_the_runtime_loads_nothing_heavy() -> None:
    sources = str(Path(__file__).resolve().parents[3] / "src")
    command = [sys.executable, "-I", "-S", "-E", "-c", _LEAN, sources]

    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


SAMPLES: list[object] = [
    None, True, -3, 1.5, "", "ä\n\"\\", [], {}, [1, [2, {"a": None}]],
    {"a": {"b": [1, 2, {"c": "d"}]}},
]  # fmt: skip


@pytest.mark.parametrize("value", SAMPLES)
def test_json_goes_out_and_comes_back(value: object) -> None:
    text = lean_json.dumps(value)

    assert json.loads(text) == value
    assert lean_json.loads(f" \n{text}\t") == value
    assert lean_json.loads(json.dumps(value, indent=3).encode()) == value


@pytest.mark.parametrize("text", ["", "{", '{"a":}', "[1,]", "1 2", '"\x01"', "nul", "[" * 100_000])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="isn't JSON"):
        lean_json.loads(text)


def test_a_field_of_the_wrong_type_is_named_by_its_path() -> None:
    document = Fields({"linux": {"seccomp": {"syscalls": [{}, {"names": [1]}]}}})
    entries = list(document.table("linux").table("seccomp").tables("syscalls"))

    with pytest.raises(ConfigError, match=r"linux\.seccomp\.syscalls\[1\]\.names"):
        entries[1].texts("names")


def test_options_are_read_in_every_form_that_engines_use() -> None:
    words = ["--bundle", "/b", "--pid-file=/p", "-detach", "--env", "A=1", "--env=B=2", "id", "--x"]

    arguments = parse(words, "bundle/b pid-file env/e", "detach/d", ordered=True)

    assert arguments.text("bundle") == "/b"
    assert arguments.text("pid-file") == "/p"
    assert "detach" in arguments
    assert arguments.texts("env") == ["A=1", "B=2"]
    assert arguments.rest == ["id", "--x"]


def test_options_may_follow_the_id() -> None:
    arguments = parse(["one", "--memory", "1g", "-d", "--", "-x"], "memory", "detach/d")

    assert arguments.text("memory") == "1g"
    assert "detach" in arguments
    assert arguments.rest == ["one", "-x"]


def test_lists_of_processors_are_bits() -> None:
    assert processors("0-3,7", "here") == [0b10001111]
    assert processors("64,0", "here") == [1, 1]
    for wrong in ("a", "3-1", "", "-1", "99999"):
        with pytest.raises(ConfigError, match="here"):
            processors(wrong, "here")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "ä", "x" * 1025])
def test_an_id_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="container ID"):
        check_id(name)


def test_a_later_mount_option_undoes_an_earlier_one() -> None:
    options = split_options(["ro", "nosuid", "noatime", "rw", "size=1m", "rslave", "rbind", "rro"])

    assert options.flags & 3 == 2
    assert options.attributes[0] & 1 == 0
    assert options.attributes[1] & 1 == 1
    assert options.attributes_below == (1, 0)
    assert options.data == ["size=1m"]
    assert options.recursive
    assert len(options.propagation) == 1


def test_a_relative_source_is_below_the_bundle() -> None:
    mount = Fields({"destination": "/d", "source": "data", "options": ["bind"]})

    assert compile_mount(mount, "/bundle")["source"] == "/bundle/data"


def test_namespaces_are_known_and_there_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        namespace_paths(Fields({"namespaces": [{"type": "mount"}, {"type": "mount"}]}))
    with pytest.raises(ConfigError, match="private MNT namespace"):
        namespace_paths(Fields({"namespaces": [{"type": "pid"}], "maskedPaths": ["/proc/x"]}))
    with pytest.raises(ConfigError, match="absolute"):
        namespace_paths(Fields({"namespaces": [{"type": "mount", "path": "proc/1"}]}))


def test_one_document_of_limits_has_both_versions() -> None:
    resources = Fields(
        {
            "memory": {"limit": 1 << 20, "swap": 3 << 20},
            "cpu": {"shares": 1024, "quota": 5000, "period": 10_000, "cpus": "0-1"},
            "pids": {"limit": 7},
            "blockIO": {"weight": 1000},
        }
    )

    first = {file: value for _name, file, value in limits.first_version(resources)}
    second = {file: value for _name, file, value in limits.second_version(resources)}

    assert first["memory.memsw.limit_in_bytes"] == str(3 << 20)
    assert second["memory.swap.max"] == str(2 << 20)
    assert second["cpu.weight"] == "100"
    assert second["cpu.max"] == "5000 10000"
    assert first["cpu.cfs_quota_us"] == "5000"
    assert first["pids.max"] == second["pids.max"] == "7"
    assert second["io.bfq.weight"] == "1000"


def test_a_weight_of_disks_goes_to_the_file_of_the_hosts_scheduler(tmp_path: Path) -> None:
    without = limits.where(str(tmp_path), "io.bfq.weight", "8:0 1000")
    (tmp_path / "io.bfq.weight").touch()

    assert without == ("io.weight", "8:0 10000")
    assert limits.where(str(tmp_path), "io.bfq.weight", "500") == ("io.bfq.weight", "500")
    assert limits.where(str(tmp_path), "blkio.weight", "7") == ("blkio.bfq.weight", "7")


def test_swap_below_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="less than"):
        limits.second_version(Fields({"memory": {"limit": 10, "swap": 5}}))


def run_device_program(program: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """The kernel's interpreter for the few instructions that such programs have."""
    registers = [0] * 11
    memory = {0: kind | access << 16, 4: major, 8: minor}
    at = 0
    while True:
        code, packed, offset, constant = struct.unpack_from("<BBhi", program, at * 8)
        target, source = packed & 15, packed >> 4
        at += 1
        if code == 0x95:
            return registers[0]
        if code == 0x61:
            registers[target] = memory[offset]
        elif code == 0xBC:
            registers[target] = registers[source]
        elif code == 0x54:
            registers[target] &= constant
        elif code == 0x74:
            registers[target] >>= constant
        elif code == 0xB7:
            registers[target] = constant
        else:
            right = registers[source] if code & 8 else constant
            equal = registers[target] == right
            at += offset if (equal if code & 0xF0 == 0x10 else not equal) else 0


def test_the_device_program_answers_as_the_last_rule_that_fits() -> None:
    resources = Fields(
        {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rw"},
                {"allow": True, "type": "b", "major": 8, "access": "r"},
                {"allow": False, "type": "b", "major": 8, "minor": 1, "access": "r"},
            ]
        }
    )
    program = devices.program(devices.rules(resources))
    block, char, make, read, write = 1, 2, 1, 2, 4

    def allowed(*arguments: int) -> bool:
        return run_device_program(program, *arguments) == 1

    assert allowed(char, read | write, 10, 200)
    assert not allowed(char, read | write, 10, 201)
    assert allowed(block, read, 8, 0)
    assert not allowed(block, read | write, 8, 0)
    assert not allowed(block, read, 8, 1)
    assert allowed(block, make, 8, 1)
    assert allowed(char, read | write, 1, 3)
    assert not allowed(char, read, 1, 1)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({}, "invalid memory policy mode"),
        ({"mode": "INTERLEAVE", "nodes": "0"}, "invalid memory policy mode"),
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["x"]}, "invalid memory policy flag"),
        ({"mode": "MPOL_BIND", "nodes": "0-9876543210"}, "invalid memory policy nodes"),
        ({"mode": "MPOL_LOCAL", "nodes": "0-7"}, "requires 0 nodes but got 8"),
        ({"mode": "MPOL_BIND"}, "requires at least one node"),
    ],
)
def test_memory_policies_are_refused_in_runcs_words(policy: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compile_process({}, Fields({}), Fields({"memoryPolicy": policy}))


def test_device_rules_leave_out_letters_that_mean_nothing() -> None:
    entry = {"allow": False, "type": "c", "major": 1, "minor": 11, "access": "rwa"}

    first, *_always = devices.rules(Fields({"devices": [entry]}))

    assert first == (False, "c", 1, 11, "rw")
    with pytest.raises(ConfigError, match="access 'xyz'"):
        devices.rules(Fields({"devices": [{**entry, "access": "xyz"}]}))


@pytest.mark.parametrize(
    ("field", "label", "sign", "kind"),
    [
        ("apparmorProfile", "box", "/sys/kernel/security/apparmor", "apparmor"),
        ("selinuxLabel", "system_u:system_r:box_t:s0", "/sys/fs/selinux/status", "selinux"),
    ],
)
def test_labels_are_planned_where_the_host_has_them_and_refused_elsewhere(
    monkeypatch: pytest.MonkeyPatch, field: str, label: str, sign: str, kind: str
) -> None:
    process = Fields({"args": ["x"], "cwd": "/", field: label})

    monkeypatch.setattr("os.path.exists", lambda path: path == sign)
    plan = compile_whole(process, Fields({}), sets_groups=True)
    monkeypatch.setattr("os.path.exists", lambda _path: False)
    with pytest.raises(UnsupportedError, match=label):
        compile_whole(process, Fields({}), sets_groups=True)

    assert plan[kind] == label


def test_a_profile_that_confines_nothing_is_none() -> None:
    process = Fields({"args": ["x"], "cwd": "/", "apparmorProfile": "unconfined"})

    assert "apparmor" not in compile_whole(process, Fields({}), sets_groups=True)

from __future__ import annotations

import json

import pytest

from ringfence.errors import ConfigError
from ringfence.guest import messages
from ringfence.guest.spec import (
    ExecSpec,
    GuestSetup,
    InterfaceSpec,
    LayerKind,
    LayerSpec,
    MountSpec,
    MountType,
    RootSpec,
    TerminalSize,
    Writable,
)


def test_a_root_has_layers() -> None:
    with pytest.raises(ConfigError, match="at least one layer"):
        RootSpec(layers=())


def test_writes_cannot_go_to_several_layers() -> None:
    layer = LayerSpec(kind=LayerKind.VIRTIOFS, source="root")
    with pytest.raises(ConfigError, match="several layers"):
        RootSpec(layers=(layer, layer), writable=Writable.DIRECT)


def test_a_disks_file_system_is_said() -> None:
    with pytest.raises(ConfigError, match="file system of block device"):
        LayerSpec(kind=LayerKind.BLOCK, source="/dev/vda")


@pytest.mark.parametrize(
    "fields",
    [
        {"addresses": ("10.0.0.300/24",)},
        {"addresses": ("10.0.0.1/33",)},
        {"gateways": ("router",)},
        {"dns": ("8.8.8",)},
    ],
    ids=str,
)
def test_what_is_no_address_is_refused(fields: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        InterfaceSpec(
            mac="02:00:00:00:00:01",
            addresses=fields.get("addresses", ()),
            gateways=fields.get("gateways", ()),
            dns=fields.get("dns", ()),
        )


@pytest.mark.parametrize("argv", [(), ("",)], ids=["nothing", "empty name"])
def test_a_command_has_a_program(argv: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no command"):
        ExecSpec(argv=argv)


def test_zero_bytes_and_bad_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="zero byte"):
        ExecSpec(argv=("echo", "a\0b"))
    with pytest.raises(ConfigError, match="no name of a variable"):
        ExecSpec(argv=("env",), env={"A=B": "c"})


def test_relative_mount_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="absolute"):
        MountSpec(type=MountType.TMPFS, target="work")


def test_the_setup_message_has_all_that_was_asked() -> None:
    setup = GuestSetup(
        root=RootSpec.block("serial:root", "ext4", writable=Writable.DIRECT),
        hostname="here",
        mounts=(MountSpec(type=MountType.VIRTIOFS, source="m", subpath="/0", target="/w"),),
        interfaces=(InterfaceSpec(mac="02:00:00:00:00:01", addresses=("10.0.0.2/24",)),),
        limits={"nofile": (10, 20)},
    )
    message = json.loads(json.dumps(messages.setup(setup, 123)))
    assert message["time_ns"] == 123
    assert message["root"]["writable"] == "direct"
    assert message["root"]["layers"][0]["source"] == "serial:root"
    assert message["mounts"][0]["subpath"] == "/0"
    assert message["interfaces"][0]["addresses"] == ["10.0.0.2/24"]
    assert message["limits"] == {"nofile": [10, 20]}


def test_the_exec_message_has_all_that_was_asked() -> None:
    spec = ExecSpec(argv=("sh",), terminal=TerminalSize(columns=1, rows=2), timeout_s=1.5)
    message = messages.exec_request(spec)
    assert message["terminal"] == {"columns": 1, "rows": 2}
    assert message["timeout_ms"] == 1500

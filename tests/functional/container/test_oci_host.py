"""Bundles that share what is the host's: its mounts, its network devices."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.framework.bundles import Runtime, left_behind, make_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make containers"),
]


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path / "states")


def test_a_container_among_the_hosts_mounts_leaves_none(runtime: Runtime, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "sh", "-c", "readlink /proc/self/ns/mnt; ls /; exit 3")
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    kinds = [entry for entry in config["linux"]["namespaces"] if entry["type"] != "mount"]
    config["linux"].update(namespaces=kinds, maskedPaths=[], readonlyPaths=[])
    path.write_text(json.dumps(config))
    # As an engine does: what it has mounted there is its own to take away.
    subprocess.run(["mount", "--bind", bundle / "rootfs", bundle / "rootfs"], check=True)
    before = Path("/proc/self/mountinfo").read_text()

    output = runtime("run", "--bundle", str(bundle), "among", status=3)
    after = Path("/proc/self/mountinfo").read_text()
    subprocess.run(["umount", bundle / "rootfs"], check=True)

    namespace, *names = output.split()
    assert namespace == str(Path("/proc/self/ns/mnt").readlink())
    assert sorted(names) == ["bin", "dev", "etc", "proc", "sys", "tmp"]
    assert after == before


@pytest.fixture
def device() -> Iterator[str]:
    """A network device with an address of each scope."""
    name = f"rf{uuid.uuid4().hex[:8]}"
    for words in (
        ("link", "add", name, "type", "veth", "peer", "name", f"{name}p"),
        ("link", "set", name, "mtu", "1400"),
        ("address", "add", "192.0.2.77/32", "dev", name),
        ("address", "add", "127.0.0.33/32", "scope", "host", "dev", name),
    ):
        subprocess.run(["ip", *words], check=True)
    yield name
    subprocess.run(["ip", "link", "del", f"{name}p"], capture_output=True, check=False)


def test_a_network_device_moves_into_the_container(
    runtime: Runtime, tmp_path: Path, device: str
) -> None:
    bundle = make_bundle(
        tmp_path, "ip", "address", "show", "dev", "inside",
        linux={"netDevices": {device: {"name": "inside"}}},
    )  # fmt: skip

    output = runtime("run", "--bundle", str(bundle), "moves")

    assert "inet 192.0.2.77/32" in output
    assert "127.0.0.33" not in output
    assert "mtu 1400" in output
    assert "UP" in output.partition(">")[0]


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ({"nowhere": {}}, "no network device nowhere"),
        ({"a/b": {}}, "invalid network device name 'a/b'"),
        ({"lo": {"name": "x" * 16}}, "invalid network device name"),
    ],
)
def test_a_network_device_that_cannot_move_is_told_of(
    runtime: Runtime, tmp_path: Path, devices: dict[str, object], words: str
) -> None:
    bundle = make_bundle(tmp_path, "true", linux={"netDevices": devices})

    output = runtime("run", "--bundle", str(bundle), "moves", status=1)

    assert words in output
    assert left_behind("moves") == []

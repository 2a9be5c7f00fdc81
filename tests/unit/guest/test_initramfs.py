from __future__ import annotations

import gzip
import lzma
from typing import TYPE_CHECKING

import pytest
import zstandard

from ringfence.errors import ConfigError, FormatError
from ringfence.guest import initramfs
from ringfence.guest.initramfs import resolve_modules
from ringfence.guest.kernels import Kernel
from tests.unit.guest.test_newc import members

if TYPE_CHECKING:
    from pathlib import Path

STATIC_PROGRAM = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + b"\x02\x00\x3e\x00" + bytes(100)


def module(depends: str = "", softdep: str = "") -> bytes:
    info = b"\0license=GPL\0depends=" + depends.encode() + b"\0"
    if softdep:
        info += b"softdep=" + softdep.encode() + b"\0"
    return b"\x7fELF" + bytes(60) + info


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    root = tmp_path / "modules"
    drivers = root / "kernel" / "drivers"
    drivers.mkdir(parents=True)
    (drivers / "virtio.ko").write_bytes(module())
    (drivers / "virtio_ring.ko.xz").write_bytes(lzma.compress(module("virtio")))
    (drivers / "virtio_pci.ko.zst").write_bytes(
        zstandard.compress(module("virtio,virtio-ring,builtin_one"))
    )
    (drivers / "crc-old.ko.gz").write_bytes(gzip.compress(module()))
    (drivers / "erofs.ko").write_bytes(module("", "pre: crc-old post: virtio"))
    return root


@pytest.fixture
def kernel(modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"kernel")
    return Kernel(version="1.2.3", image=image, modules=modules, source="path")


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(STATIC_PROGRAM)
    return path


def test_modules_come_behind_what_they_need_whatever_their_compression(modules: Path) -> None:
    found = resolve_modules(modules, ("virtio_pci", "not_there"))
    assert [one.name for one in found] == ["virtio", "virtio_ring", "virtio_pci"]
    assert found[2].needs == ("virtio", "virtio_ring")
    assert all(one.data.startswith(b"\x7fELF") for one in found)


def test_a_module_is_found_by_either_spelling(modules: Path) -> None:
    assert [one.name for one in resolve_modules(modules, ("virtio-ring",))][-1] == "virtio_ring"


def test_soft_dependencies_before_count(modules: Path) -> None:
    assert [one.name for one in resolve_modules(modules, ("erofs",))] == ["crc_old", "erofs"]


def test_modules_that_need_each_other_are_refused(modules: Path) -> None:
    folder = modules / "kernel"
    (folder / "a.ko").write_bytes(module("b"))
    (folder / "b.ko").write_bytes(module("a"))
    with pytest.raises(FormatError, match="needs itself"):
        resolve_modules(modules, ("a",))


@pytest.mark.parametrize("suffix", [".ko", ".ko.xz", ".ko.gz", ".ko.zst"])
def test_a_corrupt_module_is_refused(modules: Path, suffix: str) -> None:
    (modules / "kernel" / f"bad{suffix}").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="bad"):
        resolve_modules(modules, ("bad",))


def test_it_holds_the_agent_the_modules_and_their_list(kernel: Kernel, agent: Path) -> None:
    found = members(initramfs.build(kernel, agent).read_bytes())
    assert found["init"][:2] == (0o100755, STATIC_PROGRAM)
    lines = found["ringfence/modules"][1].decode().splitlines()
    assert "virtio_pci virtio_pci.ko virtio virtio_ring" in lines
    assert lines.index("virtio virtio.ko") == 0
    for line in lines:
        assert f"ringfence/{line.split()[1]}" in found
    # The kernel opens the one before there is a /dev; programs expect the other.
    assert found["dev/console"][2:] == (5, 1)
    assert found["dev/null"][2:] == (1, 3)


def test_it_is_made_once_for_a_kernel_and_an_agent(kernel: Kernel, agent: Path) -> None:
    first = initramfs.build(kernel, agent)
    made = first.stat().st_mtime_ns
    assert initramfs.build(kernel, agent) == first
    assert first.stat().st_mtime_ns == made
    agent.write_bytes(STATIC_PROGRAM + b"newer")
    second = initramfs.build(kernel, agent)
    assert second != first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, second.name])


def test_the_cache_keeps_a_few(kernel: Kernel, agent: Path) -> None:
    made = []
    for number in range(12):
        agent.write_bytes(STATIC_PROGRAM + bytes([number]))
        made.append(initramfs.build(kernel, agent))
    kept = list(made[-1].parent.iterdir())
    assert len(kept) == 8
    assert made[-1] in kept


@pytest.mark.parametrize(
    ("config", "kept"),
    [("CONFIG_MODULE_SIG=y\n", False), ("CONFIG_MODULE_SIG_FORCE=y\n", True), (None, True)],
    ids=["not forced", "forced", "unknown"],
)
def test_signatures_go_where_the_kernel_does_without(
    kernel: Kernel, agent: Path, config: str | None, kept: bool
) -> None:
    plain = module()
    signature = b"s" * 300
    tail = bytes(8) + len(signature).to_bytes(4, "big") + b"~Module signature appended~\n"
    (kernel.modules / "kernel" / "drivers" / "virtio.ko").write_bytes(plain + signature + tail)
    if config is not None:
        (kernel.image.parent / "config-1.2.3").write_text(config)
    found = members(initramfs.build(kernel, agent).read_bytes())["ringfence/virtio.ko"][1]
    assert found == (plain + signature + tail if kept else plain)


@pytest.mark.parametrize(
    "program",
    [
        b"#!/bin/sh\n",
        b"",
        STATIC_PROGRAM + b"/lib64/ld-linux-x86-64.so.2",
        STATIC_PROGRAM.replace(b"\x3e", b"\xb7"),
    ],
    ids=["script", "empty", "dynamic", "another processor"],
)
def test_an_agent_that_cannot_run_in_a_guest_is_refused(
    kernel: Kernel, agent: Path, program: bytes
) -> None:
    agent.write_bytes(program)
    with pytest.raises(ConfigError, match="no static x86-64 program"):
        initramfs.build(kernel, agent)


def test_a_missing_agent_is_refused_with_the_remedy(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make build"):
        initramfs.build(kernel, tmp_path / "nowhere")

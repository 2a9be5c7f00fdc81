from __future__ import annotations

import os
import shutil
import sys
import types
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import (
    ConfigError,
    FormatError,
    HostError,
    NotFoundError,
    UnsupportedError,
)
from ringfence.guest import kernels, packages

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE = "linux-image-9.8.7-1-cloud-amd64"


def bzimage(version: str) -> bytes:
    """As much of the boot protocol's header as says the version."""
    head = bytearray(0x400)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x100).to_bytes(2, "little")
    head[0x300:] = f"{version} (builder@host) #1 SMP".encode().ljust(0x100, b"\0")
    return bytes(head)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No kernel of this host, nor of its user's cache."""
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kernels, "_boot", lambda *_: [])
    monkeypatch.setitem(sys.modules, "ringfence._native.host", None)
    return tmp_path / "home"


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt and dpkg-deb that know one kernel; what they were asked is in the file ``asked``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "apt-cache": f'[ "$3" = linux-image-cloud-amd64 ] || exit 100; echo "  Depends: {PACKAGE}"',
        "apt-get": f'echo "$@" >> {tmp_path}/asked; echo package > {PACKAGE}_1_amd64.deb',
        "dpkg-deb": (
            f"mkdir -p $3/boot $3/lib/modules/9.8.7-1-cloud-amd64/kernel; "
            f"cp {tmp_path}/image $3/boot/vmlinuz-9.8.7-1-cloud-amd64"
        ),
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\nset -e\n{script}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "image").write_bytes(bzimage("9.8.7-1-cloud-amd64"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "asked"


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage("6.1.0-10-amd64"))
    modules = tmp_path / "lib" / "modules" / "6.1.0-10-amd64"
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel" / "x.ko").write_bytes(b"\x7fELF")
    (modules / "build").symlink_to("/usr/src/linux")
    return image


def test_the_distributions_kernel_is_fetched_once(fake_apt: Path) -> None:
    first = kernels.find()
    assert first.version == "9.8.7-1-cloud-amd64"
    assert first.source == f"cache (package {PACKAGE})"
    assert first.image.is_file()
    assert first.modules.is_dir()
    assert kernels.find() == first
    assert kernels.fetch() == first
    assert fake_apt.read_text().splitlines() == [f"download {PACKAGE}"]


@pytest.mark.usefixtures("fake_apt")
def test_a_failed_download_leaves_nothing(tmp_path: Path, home: Path) -> None:
    script = tmp_path / "bin" / "apt-get"
    script.write_text("#!/bin/sh\necho 'E: Hash Sum mismatch' >&2\nexit 100\n")
    with pytest.raises(HostError, match="Hash Sum mismatch"):
        kernels.find()
    assert list((home / "cache" / "kernels").iterdir()) == []


@pytest.mark.usefixtures("fake_apt")
def test_missing_package_lists_are_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "bin" / "apt-cache").write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(HostError, match="apt-get update"):
        kernels.find()


def test_a_distribution_without_apt_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UnsupportedError, match="ringfence kernel import"):
        packages.current_kernel_package()


def test_a_path_is_taken_with_the_modules_beside_it(imported: Path) -> None:
    kernel = kernels.find(imported)
    assert kernel.version == "6.1.0-10-amd64"
    assert kernel.image == imported
    # As a package has them: boot/vmlinuz and lib/modules.
    boot = imported.parent / "boot"
    boot.mkdir()
    moved = imported.rename(boot / "vmlinuz")
    assert kernels.find(str(moved)).modules == imported.parent / "lib/modules/6.1.0-10-amd64"


def test_an_imported_kernel_is_copied_without_the_links_of_its_build(imported: Path) -> None:
    kernel = kernels.import_kernel(imported, modules=imported.parent / "lib" / "modules")
    imported.unlink()
    assert kernels.find("6.1.0-10-amd64") == kernel
    assert (kernel.modules / "kernel" / "x.ko").is_file()
    assert not os.path.lexists(kernel.modules / "build")
    assert kernels.list_kernels() == [kernel]


def test_importing_again_replaces(imported: Path) -> None:
    kernels.import_kernel(imported)
    imported.write_bytes(bzimage("6.1.0-10-amd64") + b"newer")
    kernel = kernels.import_kernel(imported)
    assert kernel.image.read_bytes().endswith(b"newer")
    assert len(kernels.list_kernels()) == 1


def test_newer_kernels_come_first(imported: Path) -> None:
    for version in ("6.1.0-9-amd64", "6.1.0-10-amd64", "5.15.0-100-amd64", "6.1.0-rc1"):
        imported.write_bytes(bzimage(version))
        kernels.import_kernel(imported)
    found = [kernel.version for kernel in kernels.list_kernels()]
    assert found[:2] == ["6.1.0-10-amd64", "6.1.0-9-amd64"]
    assert found[-1] == "5.15.0-100-amd64"


def test_an_elf_image_says_its_version(imported: Path) -> None:
    imported.write_bytes(b"\x7fELF" + bytes(9000) + b"Linux version 6.9.1-test (x) #1")
    assert kernels.image_version(imported) == "6.9.1-test"


@pytest.mark.parametrize(
    "data", [b"", b"#!/bin/sh\n", bytes(0x400), b"\x7fELF" + bytes(100)], ids=repr
)
def test_what_is_no_kernel_is_refused(imported: Path, data: bytes) -> None:
    imported.write_bytes(data)
    with pytest.raises(FormatError):
        kernels.find(imported)


def test_unknown_kernels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no kernel 1\.2\.3"):
        kernels.find("1.2.3")
    with pytest.raises(NotFoundError, match="nowhere"):
        kernels.find(tmp_path / "nowhere")


def test_a_directory_that_has_no_modules_is_refused(imported: Path) -> None:
    with pytest.raises(ConfigError, match="no directory of modules"):
        kernels.import_kernel(imported, modules=imported)


def test_only_boot_kernels_that_can_be_guests_are_listed(tmp_path: Path) -> None:
    boot, modules = tmp_path / "boot", tmp_path / "host-modules"
    boot.mkdir()
    for version, names in {
        "6.1.0-1": "kernel/virtio_pci.ko\nkernel/vmw_vsock_virtio_transport.ko\n",
        "6.1.0-2": "kernel/virtio_pci.ko\n",
    }.items():
        (boot / f"vmlinuz-{version}").write_bytes(bzimage(version))
        (modules / version).mkdir(parents=True)
        (modules / version / "modules.order").write_text(names)
    (boot / "vmlinuz-6.1.0-3").write_bytes(bzimage("6.1.0-3"))
    found = REAL_BOOT(boot, modules)
    assert [kernel.version for kernel in found] == ["6.1.0-1"]


REAL_BOOT = kernels._boot


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The compiled module's unpacking, which makes ELF of a bzImage; what it was given."""
    asked: list[Path] = []

    def unpack_kernel(source: Path, target: Path) -> bool:
        asked.append(source)
        target.write_bytes(b"\x7fELF" + source.read_bytes())
        return True

    module = types.ModuleType("ringfence._native.host")
    module.unpack_kernel = unpack_kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ringfence._native", types.ModuleType("ringfence._native"))
    monkeypatch.setitem(sys.modules, "ringfence._native.host", module)
    return asked


def test_a_kept_kernel_is_unpacked_once(imported: Path, native: list[Path]) -> None:
    kernels.import_kernel(imported)
    first = kernels.find("6.1.0-10-amd64")
    assert first.image.name == "vmlinux"
    assert first.packed.read_bytes() == imported.read_bytes()
    assert first.image.read_bytes().startswith(b"\x7fELF")
    assert kernels.find() == first
    assert len(native) == 1
    # Nothing half-made is left beside it.
    names = {"vmlinuz", "vmlinux", "modules", "source"}
    assert {path.name for path in first.image.parent.iterdir()} == names


def test_a_kernel_that_cannot_be_unpacked_is_used_as_it_is(
    imported: Path, native: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> bool:
        target.write_bytes(b"half")
        raise FormatError(str(source))

    monkeypatch.setattr(sys.modules["ringfence._native.host"], "unpack_kernel", refuse)
    kept = kernels.import_kernel(imported)
    assert kernels.find() == kept
    monkeypatch.setitem(sys.modules, "ringfence._native.host", None)
    assert kernels.find() == kept
    assert native == []


def test_a_kernel_outside_of_the_cache_is_left_alone(imported: Path, native: list[Path]) -> None:
    kernel = kernels.find(imported)
    assert kernel.image == kernel.packed == imported
    assert native == []

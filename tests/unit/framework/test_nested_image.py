"""The nested host's initramfs."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.framework import nested_image

if TYPE_CHECKING:
    from pathlib import Path


def module(folder: Path, name: str, depends: str) -> Path:
    path = folder / f"{name}.ko"
    path.write_bytes(b"\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")
    return path


def test_modules_come_behind_what_they_need(tmp_path: Path) -> None:
    card = module(tmp_path, "card-amd", "core_part,other")
    core = module(tmp_path, "core_part", "other")
    other = module(tmp_path, "other", "")
    order = nested_image.load_order(tmp_path, ("card_amd", "built-in", "other"))
    assert order == [other, core, card]


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"not really")
    modules = [module(tmp_path, "a", ""), module(tmp_path, "b", "a")]
    archive = nested_image.archive(busybox, modules)
    names = member_names(archive)
    assert names[-1] == "TRAILER!!!"
    assert {"init", "bin/busybox", "modules/a.ko", "modules/b.ko", "proc"} <= set(names)
    assert names.index("bin") < names.index("bin/busybox")


def member_names(archive: bytes) -> list[str]:
    """Reads a newc archive by its format's description alone."""
    names = []
    offset = 0
    while offset < len(archive):
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[offset + 6 + n * 8 :][:8], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        names.append(archive[offset + 110 :][: name_size - 1].decode())
        offset += 110 + name_size
        offset += -offset % 4 + size
        offset += -offset % 4
    return names


def test_the_init_script_is_one_that_a_shell_reads() -> None:
    checked = subprocess.run(["/bin/sh", "-n"], input=nested_image.INIT.encode(), check=False)
    assert checked.returncode == 0

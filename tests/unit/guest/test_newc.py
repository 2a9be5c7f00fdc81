from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from ringfence.guest.newc import Entry, archive

if TYPE_CHECKING:
    from pathlib import Path

ENTRIES = [
    Entry.directory("dev"),
    Entry.device("dev/null", 0o666, 1, 3),
    Entry.file("init", b"#!/bin/sh\n", 0o755),
    Entry.file("empty", b""),
    Entry.file("long-" + "n" * 90, bytes(range(256))),
]


def members(data: bytes) -> dict[str, tuple[int, bytes, int, int]]:
    """Reads an archive as the kernel's document says: an independent reader."""
    found: dict[str, tuple[int, bytes, int, int]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, major, minor, name_size = fields[1], *fields[6:7], *fields[9:12]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        start = at + 110 + name_size
        start += -start % 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[start : start + size], major, minor)
        at = start + size
        at += -at % 4


def test_members_are_read_back() -> None:
    found = members(archive(ENTRIES))
    assert found["init"] == (0o100755, b"#!/bin/sh\n", 0, 0)
    assert found["dev"] == (0o040755, b"", 0, 0)
    assert found["dev/null"] == (0o020666, b"", 1, 3)
    assert found["long-" + "n" * 90][1] == bytes(range(256))
    assert list(found) == [entry.name for entry in ENTRIES]


def test_equal_contents_make_equal_archives() -> None:
    assert archive(ENTRIES) == archive(list(ENTRIES))


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio as the outside witness")
def test_cpio_reads_it(tmp_path: Path) -> None:
    entries = [entry for entry in ENTRIES if entry.name != "dev/null"]
    subprocess.run(["cpio", "-id", "--quiet"], cwd=tmp_path, input=archive(entries), check=True)
    assert (tmp_path / "init").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755

"""Files of the guest through a real agent."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, GuestError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.guest.conftest import Hosted


def test_files_are_written_read_moved_and_removed(hosted: Hosted, tmp_path: Path) -> None:
    files = hosted.agent.files
    folder = f"{tmp_path}/a/b"
    with pytest.raises(GuestError, match="No such file"):
        files.mkdir(folder)
    files.mkdir(folder, parents=True)
    files.mkdir(folder, parents=True)
    data = os.urandom(300_000)
    assert files.write(f"{folder}/file", data, mode=0o600) == len(data)
    assert files.write(f"{folder}/file", [b"more", b""], append=True) == 4
    assert files.read(f"{folder}/file") == data + b"more"
    assert b"".join(files.read_chunks(f"{folder}/file", offset=len(data), length=2)) == b"mo"
    status = files.stat(f"{folder}/file")
    assert (status.type, status.size, status.mode) == ("file", len(data) + 4, 0o600)
    (tmp_path / "a" / "link").symlink_to("b")
    entries = files.list(f"{tmp_path}/a")
    assert [(one.name, one.type, one.target) for one in entries] == [
        ("b", "directory", ""),
        ("link", "symlink", "b"),
    ]
    files.rename(f"{folder}/file", f"{tmp_path}/moved")
    assert files.exists(f"{tmp_path}/moved")
    files.write(f"{folder}/again", b"")
    with pytest.raises(GuestError, match="not empty"):
        files.remove(folder)
    files.remove(f"{tmp_path}/a", recursive=True)
    assert not files.exists(f"{tmp_path}/a")


def test_a_very_deep_directory_is_removed(hosted: Hosted, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(3000):
            os.mkdir("d", dir_fd=folder)
            inner = os.open("d", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
        hosted.agent.files.remove(f"{tmp_path}/d", recursive=True)
        assert list(tmp_path.iterdir()) == []
    finally:
        os.close(folder)
        # Python's own way of removing it would be too deep for Python.
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_a_long_directory_is_listed_whole(hosted: Hosted, tmp_path: Path) -> None:
    for number in range(2500):
        (tmp_path / f"{number:04}").touch()
    names = [one.name for one in hosted.agent.files.list(str(tmp_path))]
    assert names == [f"{number:04}" for number in range(2500)]


def test_what_cannot_be_done_with_files_is_said(hosted: Hosted, tmp_path: Path) -> None:
    files = hosted.agent.files
    with pytest.raises(GuestError, match=r"cannot read /nowhere: No such file"):
        files.read("/nowhere")
    with pytest.raises(ConfigError, match="is a directory"):
        files.read(str(tmp_path))
    with pytest.raises(ConfigError, match="no absolute path"):
        files.read("relative")
    with pytest.raises(GuestError, match="cannot write"):
        files.write(f"{tmp_path}/no/file", bytes(1 << 20))
    # A full disk is seen in the middle of the stream.
    with pytest.raises(GuestError, match="No space"):
        files.write("/dev/full", bytes(1 << 20))


def test_trees_are_copied_in_and_out(hosted: Hosted, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(os.urandom(200_000))
    with (source / "sparse").open("wb") as file:
        for number in range(40):
            file.seek(number << 20)
            file.write(b"data")
    hosted.agent.files.copy_in(source, f"{tmp_path}/there")
    there = tmp_path / "there"
    assert (there / "sparse").read_bytes() == (source / "sparse").read_bytes()
    assert (there / "sparse").stat().st_blocks <= (source / "sparse").stat().st_blocks + 8
    hosted.agent.files.copy_out(str(there), tmp_path / "back")
    back = tmp_path / "back"
    assert (back / "sub" / "file").read_bytes() == (source / "sub" / "file").read_bytes()
    assert (back / "sparse").stat().st_blocks <= (source / "sparse").stat().st_blocks + 8
    # Into a directory that is there, under its own name.
    hosted.agent.files.copy_in(source / "sub" / "file", str(back))
    assert (back / "file").stat().st_size == 200_000


def test_a_broken_archive_is_refused(hosted: Hosted, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="cannot unpack"):
        hosted.agent.files.tar_in(str(tmp_path), [b"nonsense" * 1000])
    with pytest.raises(GuestError, match="cannot archive /nowhere"):
        list(hosted.agent.files.tar_out("/nowhere"))

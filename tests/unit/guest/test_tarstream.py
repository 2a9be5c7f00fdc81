from __future__ import annotations

import io
import socket
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConflictError, FormatError, NotFoundError
from ringfence.guest import tarstream

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "file").write_bytes(b"x" * 1000)
    (root / "run").write_text("#!/bin/sh\n")
    (root / "run").chmod(0o755)
    (root / "sub" / ("n" * 180)).write_bytes(b"long name")
    (root / "link").symlink_to("sub")
    return root


def sparse(path: Path, holes: int) -> None:
    with path.open("wb") as file:
        for number in range(holes):
            file.seek((number + 1) << 20)
            file.write(b"data" * 100)
        file.truncate((holes + 2) << 20)


def same(one: Path, other: Path) -> bool:
    return (
        subprocess.run(["diff", "-r", "--no-dereference", one, other], check=False).returncode == 0
    )


def test_a_tree_goes_there_and_back(tree: Path, tmp_path: Path) -> None:
    tarstream.unpack(tarstream.pack(tree, "tree"), "tree", tmp_path / "copy")
    assert same(tree, tmp_path / "copy")
    assert (tmp_path / "copy" / "run").stat().st_mode & 0o777 == 0o755


def test_a_copy_into_a_directory_keeps_its_name(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "into"
    target.mkdir()
    tarstream.unpack(tarstream.pack(tree / "file", "file"), "file", target)
    assert (target / "file").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("holes", [0, 1, 3, 4, 5, 24, 60])
def test_sparse_files_stay_sparse_and_tar_agrees(tmp_path: Path, holes: int) -> None:
    source = tmp_path / "sparse"
    sparse(source, holes)
    stream = b"".join(tarstream.pack(source, "sparse"))
    # What goes over is the data, rounded up to the file system's blocks.
    assert len(stream) < (holes + 1) * 8192 + 4096
    # The outside witness.
    witness = tmp_path / "witness"
    witness.mkdir()
    subprocess.run(["tar", "-x", "-C", witness], input=stream, check=True)
    assert (witness / "sparse").read_bytes() == source.read_bytes()
    tarstream.unpack(iter([stream]), "sparse", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks <= source.stat().st_blocks + 8


def test_sockets_are_left_out(tree: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "socket"))
        tarstream.unpack(tarstream.pack(tree, "tree"), "tree", tmp_path / "copy")
    assert not (tmp_path / "copy" / "socket").exists()


def test_a_missing_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        list(tarstream.pack(tmp_path / "nowhere", "x"))


def test_an_existing_directory_is_kept(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "into" / "tree").mkdir(parents=True)
    with pytest.raises(ConflictError, match="already"):
        tarstream.unpack(tarstream.pack(tree, "tree"), "tree", tmp_path / "into")


def hostile(fill: Callable[[tarfile.TarFile], None]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        fill(archive)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside")],
        [member("/tmp/outside")],
        [member("other")],
        [member("copy", tarfile.DIRTYPE), member("copy/up", tarfile.SYMTYPE, "../../..")],
        [member("copy", tarfile.SYMTYPE, "/etc")],
        [member("copy", tarfile.CHRTYPE)],
        [member("copy"), member("second")],
    ],
    ids=["parent", "absolute", "another name", "link up", "absolute link", "device", "two"],
)
def test_a_hostile_stream_reaches_nothing_beside_its_copy(
    tmp_path: Path, members: list[tarfile.TarInfo]
) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def fill(archive: tarfile.TarFile) -> None:
        for info in members:
            archive.addfile(info)

    with pytest.raises(FormatError):
        tarstream.unpack(iter([hostile(fill)]), "copy", place)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("stream", [b"", b"nonsense" * 100, bytes(10240)], ids=["", "no tar", "0"])
def test_what_is_no_archive_is_refused(tmp_path: Path, stream: bytes) -> None:
    with pytest.raises(FormatError):
        tarstream.unpack(iter([stream]), "copy", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from ringfence.errors import FormatError
from ringfence.image import Limits
from ringfence.image.compression import Decompressed
from ringfence.image.ownership import Ownership
from ringfence.image.unpack import Unpacked, unpack_layer
from tests.unit.image.images import files, layer, member

DIR = tarfile.DIRTYPE
SYM = tarfile.SYMTYPE
HARD = tarfile.LNKTYPE


def unpack(
    tar: bytes,
    root: Path,
    *,
    limits: Limits | None = None,
    lowers: tuple[Path, ...] = (),
) -> Unpacked:
    root.mkdir(exist_ok=True)
    # Pieces of odd lengths, so that members cross their borders.
    pieces = [tar[at : at + 1000] for at in range(0, len(tar), 1000)]
    return unpack_layer(
        pieces,
        root,
        ownership=Ownership.default(),
        limits=limits or Limits(),
        lowers=lowers,
    )


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def test_contents_modes_times_and_links(tmp_path: Path) -> None:
    long_name = "d/" + "n" * 180
    tar = layer(
        [
            member("d", DIR, mode=0o750, mtime=1000),
            (member("d/f", mode=0o640, mtime=1234.5), b"x" * 5000),
            (member("d/empty"), b""),
            (member(long_name), b"long"),
            member("d/s", SYM, linkname="../nowhere"),
            member("d/h", HARD, linkname="d/f"),
            member("d/fifo", tarfile.FIFOTYPE),
            (member("./d/../d/x".replace("d/../", "")), b"y"),
        ],
    )
    unpack(tar, tmp_path / "r")
    d = tmp_path / "r" / "d"
    assert (d / "f").read_bytes() == b"x" * 5000
    assert (d / "f").stat().st_mtime == 1234.5
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o640
    assert d.stat().st_mtime == 1000
    assert stat.S_IMODE(d.stat().st_mode) == 0o750
    assert (tmp_path / "r" / long_name).read_bytes() == b"long"
    assert (d / "s").readlink() == Path("../nowhere")
    assert (d / "h").stat().st_ino == (d / "f").stat().st_ino
    assert stat.S_ISFIFO((d / "fifo").stat().st_mode)
    assert (d / "x").read_bytes() == b"y"


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/../out", "a/.."])
def test_dotdot_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="out of its directory"):
        unpack(files({name: b"x"}), tmp_path / "r")
    assert not (tmp_path / "out").exists()


def test_absolute_names_stay_inside(tmp_path: Path) -> None:
    unpack(files({"/etc/x": b"1"}), tmp_path / "r")
    assert (tmp_path / "r/etc/x").read_bytes() == b"1"


@pytest.mark.parametrize("target", ["../outside", "/outside", "../../../../../outside"])
def test_links_never_lead_out(tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").mkdir()
    tar = layer([member("l", SYM, linkname=target), (member("l/f"), b"x")])
    unpack(tar, tmp_path / "r")
    assert list((tmp_path / "outside").iterdir()) == []
    assert (tmp_path / "r/outside/f").read_bytes() == b"x"


def test_link_to_own_directory_is_followed(tmp_path: Path) -> None:
    tar = layer(
        [
            member("usr", DIR),
            member("usr/lib", DIR),
            member("lib", SYM, linkname="usr/lib"),
            (member("lib/a"), b"a"),
            member("b", HARD, linkname="lib/a"),
        ],
    )
    unpack(tar, tmp_path / "r")
    assert (tmp_path / "r/usr/lib/a").read_bytes() == b"a"
    assert (tmp_path / "r/b").read_bytes() == b"a"


def test_circle_of_links_is_refused(tmp_path: Path) -> None:
    tar = layer(
        [
            member("a", SYM, linkname="b"),
            member("b", SYM, linkname="a"),
            (member("a/f"), b"x"),
        ],
    )
    with pytest.raises(FormatError, match="circle"):
        unpack(tar, tmp_path / "r")


def test_directory_replaced_by_link_gets_no_late_attributes(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    tar = layer([member("d", DIR, mode=0o777), member("d", SYM, linkname=str(victim))])
    unpack(tar, tmp_path / "r")
    assert stat.S_IMODE(victim.stat().st_mode) == 0o700
    assert (tmp_path / "r/d").is_symlink()


def test_file_over_link_replaces_the_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"old")
    tar = layer([member("f", SYM, linkname=str(victim)), (member("f"), b"new")])
    unpack(tar, tmp_path / "r")
    assert victim.read_bytes() == b"old"
    assert (tmp_path / "r/f").read_bytes() == b"new"


def test_hard_link_to_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    for target in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(FormatError):
            unpack(layer([member("h", HARD, linkname=target)]), tmp_path / "r")


def test_whiteouts_and_opaque_directories(tmp_path: Path) -> None:
    tar = layer(
        [
            member("d", DIR),
            member("d/.wh.gone"),
            member("e", DIR),
            member("e/.wh..wh..opq"),
            (member("e/new"), b"n"),
            (member("own"), b"o"),
            member(".wh.own"),
            member(".wh..wh.plnk", DIR),
        ],
    )
    unpack(tar, tmp_path / "r")
    assert is_whiteout(tmp_path / "r/d/gone")
    assert os.getxattr(tmp_path / "r/e", "user.overlay.opaque") == b"y"
    assert (tmp_path / "r/own").read_bytes() == b"o"
    assert not (tmp_path / "r/.wh..wh.plnk").exists()


def test_whiteout_then_directory_is_opaque(tmp_path: Path) -> None:
    unpack(layer([member(".wh.d"), (member("d/f"), b"x")]), tmp_path / "r")
    assert os.getxattr(tmp_path / "r/d", "user.overlay.opaque") == b"y"


def test_attributes_that_would_steer_the_overlay_are_left_out(tmp_path: Path) -> None:
    info = member("d", DIR)
    info.pax_headers = {
        "SCHILY.xattr.user.note": "kept",
        "SCHILY.xattr.user.overlay.redirect": "/etc",
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
    }
    unpack(layer([info]), tmp_path / "r")
    assert os.getxattr(tmp_path / "r/d", "user.note") == b"kept"
    names = os.listxattr(tmp_path / "r/d")
    assert not [name for name in names if "overlay" in name]


def test_sparse_file_by_gnu_tar_keeps_its_holes(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(4 << 20)
    for form in ("gnu", "posix"):
        tar = tmp_path / f"{form}.tar"
        command = [
            "tar",
            "--sparse",
            f"--format={form}",
            "-C",
            str(tmp_path),
            "-cf",
            str(tar),
            "sparse",
        ]
        subprocess.run(command, check=True)
        unpack(tar.read_bytes(), tmp_path / form)
        found = tmp_path / form / "sparse"
        assert found.read_bytes() == sparse.read_bytes()
        assert found.stat().st_blocks * 512 < 1 << 20


def test_missing_directories_take_attributes_from_below(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    (lower / "tmp").mkdir(parents=True)
    (lower / "tmp").chmod(0o1777)
    done = unpack(files({"tmp/f": b"x"}), tmp_path / "r", lowers=(lower,))
    assert done.needs_lower
    assert stat.S_IMODE((tmp_path / "r/tmp").stat().st_mode) & 0o777 == 0o777


def test_hard_link_to_a_lower_file_is_copied(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "f").write_bytes(b"below")
    tar = layer([member("h", HARD, linkname="f")])
    assert unpack(tar, tmp_path / "r", lowers=(lower,)).needs_lower
    assert (tmp_path / "r/h").read_bytes() == b"below"


def test_limits(tmp_path: Path) -> None:
    many = layer([member(f"d{n}", DIR) for n in range(20)])
    with pytest.raises(FormatError, match="entries"):
        unpack(many, tmp_path / "a", limits=Limits(entries=10))
    with pytest.raises(FormatError, match="larger"):
        unpack(files({"f": b"x" * 100}), tmp_path / "b", limits=Limits(layer_bytes=50))
    with pytest.raises(FormatError, match="components"):
        unpack(files({"a/" * 20 + "f": b""}), tmp_path / "c", limits=Limits(depth=10))


def test_bomb_is_refused_early() -> None:
    bomb = gzip.compress(bytes(16 << 20))
    limits = Limits(ratio_from_bytes=1 << 20, ratio=100)
    with (
        Decompressed(io.BytesIO(bomb), limits) as pieces,
        pytest.raises(FormatError, match="bomb"),
    ):
        assert sum(map(len, pieces)) < 3 << 20


@pytest.mark.parametrize("cut", [10, 600, 2000])
def test_cut_archives_are_refused(tmp_path: Path, cut: int) -> None:
    tar = files({"f": b"x" * 3000})
    with pytest.raises(FormatError):
        unpack(tar[:cut], tmp_path / "r")


def test_flipped_header_is_refused(tmp_path: Path) -> None:
    tar = bytearray(files({"f": b"x"}))
    tar[0] ^= 1
    with pytest.raises(FormatError, match="checksum"):
        unpack(bytes(tar), tmp_path / "r")


def test_cut_gzip_is_refused() -> None:
    data = gzip.compress(os.urandom(100_000))[:-20]
    with (
        Decompressed(io.BytesIO(data), Limits()) as pieces,
        pytest.raises(FormatError, match="too early"),
    ):
        for _ in pieces:
            pass

from __future__ import annotations

import io
import os
import stat
import subprocess
from pathlib import Path

import pytest

from ringfence.errors import NotFoundError
from ringfence.image import Store
from ringfence.image.create import from_directory, from_tar
from ringfence.image.layers import LayerWriter
from ringfence.image.pack import PackOptions, pack_tree
from tests.unit.image.images import files


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def tree(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "sh").write_bytes(b"#!" * 3000)
    (root / "bin" / "sh").chmod(0o4755)
    os.link(root / "bin" / "sh", root / "bin" / "dash")
    (root / ("long" * 40)).write_bytes(b"l")
    (root / "link").symlink_to("bin/sh")
    (root / "naïve").write_bytes(b"")
    os.setxattr(root / "bin" / "sh", "user.note", b"\0n")
    os.utime(root / "link", ns=(0, 1_500_000_000_123_456_789), follow_symlinks=False)
    return root


def test_directory_there_and_back(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    source = tree(tmp_path / "source")
    image = from_directory(store, source, "app")
    with store.rootfs(image) as unpacked:
        (root,) = unpacked.layers
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*"))
        assert names == sorted(str(p.relative_to(source)) for p in source.rglob("*"))
        assert (root / "bin/sh").read_bytes() == b"#!" * 3000
        assert (root / "bin/sh").stat().st_nlink == 2
        assert os.getxattr(root / "bin/sh", "user.note") == b"\0n"
        assert (root / "link").lstat().st_mtime_ns == 1_500_000_000_123_456_789
        if os.geteuid() == 0:
            assert stat.S_IMODE((root / "bin/sh").stat().st_mode) == 0o4755


def test_fixed_time_makes_equal_images(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    one = from_directory(store, tree(tmp_path / "one"), "one")
    two = from_directory(store, tree(tmp_path / "two"), "two")
    assert one.digest == two.digest
    assert one.config.created == "2020-09-13T12:26:40Z"


def test_gnu_tar_reads_our_layers(store: Store, tmp_path: Path) -> None:
    image = from_directory(store, tree(tmp_path / "source"), "app")
    out = tmp_path / "out"
    out.mkdir()
    blob = store.blobs.path(image.manifest.layers[0].digest)
    command = ["tar", "-xzf", str(blob), "-C", str(out), "--xattrs", "--xattrs-include=*"]
    done = subprocess.run(command, check=True, capture_output=True)
    assert done.stderr == b""
    assert (out / ("long" * 40)).read_bytes() == b"l"
    assert (out / "link").readlink() == Path("bin/sh")


def test_upper_directory_becomes_whiteouts(store: Store, tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "d").mkdir(parents=True)
    os.mknod(upper / "d" / "gone", stat.S_IFCHR, 0)
    (upper / "o").mkdir()
    os.setxattr(upper / "o", "user.overlay.opaque", b"y")
    with store.using(), LayerWriter(store) as writer:
        pack_tree(upper, writer.tar, PackOptions(overlay=True))
        layer = writer.finish()
    blob = str(store.blobs.path(layer.blob.digest))
    names = subprocess.run(["tar", "-tzf", blob], check=True, capture_output=True, text=True)
    assert names.stdout.split() == ["d/", "d/.wh.gone", "o/", "o/.wh..wh..opq"]


def test_tar_in(store: Store, tmp_path: Path) -> None:
    image = from_tar(store, io.BytesIO(files({"etc/x": b"1"})), "app")
    with store.rootfs(image) as unpacked:
        assert (unpacked.layers[0] / "etc/x").read_bytes() == b"1"
    with pytest.raises(NotFoundError):
        from_tar(store, tmp_path / "none", "app")
    with pytest.raises(NotFoundError):
        from_directory(store, tmp_path / "none", "app")

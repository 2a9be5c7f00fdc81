"""EROFS images are held against erofs-utils, and against the kernel where we may mount."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from ringfence.image import Store
from ringfence.image.erofs import write_erofs
from ringfence.image.merged import merge
from tests.unit.image.images import files, layer, member, store_image

if TYPE_CHECKING:
    from pathlib import Path


def lowers(tmp_path: Path) -> list[Path]:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    (lower / "d" / "deep").mkdir(parents=True)
    (lower / "d" / "deep" / "f").write_bytes(b"x" * 4096)
    (lower / "d" / "gone").write_bytes(b"gone")
    (lower / "big").write_bytes(os.urandom(300_000))
    (lower / "opaque").mkdir()
    (lower / "opaque" / "hidden").write_bytes(b"h")
    (upper / "d").mkdir(parents=True)
    (upper / "d").chmod(0o750)
    os.mknod(upper / "d" / "gone", stat.S_IFCHR, 0)
    (upper / "opaque").mkdir()
    os.setxattr(upper / "opaque", "user.overlay.opaque", b"y")
    (upper / "opaque" / "seen").write_bytes(b"s")
    (upper / "link").symlink_to("d/deep/f")
    (upper / "one").write_bytes(b"1" * 5000)
    os.link(upper / "one", upper / "two")
    os.setxattr(upper / "one", "user.note", b"n" * 100)
    os.utime(upper / "one", ns=(0, 1_234_567_890_123_456_789))
    for number in range(500):
        (upper / "d" / f"name-{number:04}-{'x' * 40}").write_bytes(b"%d" % number)
    return [lower, upper]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fsck_finds_no_fault_and_equal_trees_give_equal_images(tmp_path: Path) -> None:
    if shutil.which("fsck.erofs") is None:
        pytest.skip("fsck.erofs is not installed (apt install erofs-utils)")
    layers = lowers(tmp_path)
    one, two = tmp_path / "1.erofs", tmp_path / "2.erofs"
    write_erofs(merge(layers), one)
    write_erofs(merge(layers), two)
    assert digest_of(one) == digest_of(two)
    out = tmp_path / "out"
    # --extract makes it read all data.
    subprocess.run(["fsck.erofs", f"--extract={out}", one], check=True, capture_output=True)
    shown = {str(p.relative_to(out)): digest_of(p) for p in out.rglob("*") if p.is_file()}
    assert shown["big"] == digest_of(tmp_path / "lower/big")
    assert "d/gone" not in shown
    assert {"opaque/seen", "d/deep/f"} <= set(shown)
    assert "opaque/hidden" not in shown
    assert len([name for name in shown if name.startswith("d/name-")]) == 500


@pytest.mark.root
def test_the_kernel_shows_what_an_overlay_would(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    layers = lowers(tmp_path)
    os.chown(tmp_path / "upper/one", 70_000, 70_001)
    os.mknod(tmp_path / "upper/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    image, mount, overlay = tmp_path / "i.erofs", tmp_path / "m", tmp_path / "o"
    write_erofs(merge(layers), image)
    mount.mkdir()
    overlay.mkdir()
    option = f"lowerdir={layers[1]}:{layers[0]},userxattr"
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", image, mount], check=True)
    try:
        subprocess.run(["mount", "-t", "overlay", "-o", option, "overlay", overlay], check=True)
        try:
            assert listing(mount) == listing(overlay)
            assert os.getxattr(mount / "one", "user.note") == b"n" * 100
            assert (mount / "null").stat().st_rdev == os.makedev(1, 3)
        finally:
            subprocess.run(["umount", overlay], check=True)
    finally:
        subprocess.run(["umount", mount], check=True)


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that can be seen of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = digest_of(path)
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(root))] = (
            status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, links, content,
        )  # fmt: skip
    return found


def test_store_makes_a_disk_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    upper = layer([member(".wh.a"), (member("b"), b"2")])
    store_image(store, "app", [files({"a": b"1"}), upper])
    disk = store.disk(store.get("app"))
    before = disk.stat().st_ino
    assert store.disk(store.get("app")).stat().st_ino == before
    store.remove("app")
    store.prune()
    assert not disk.exists()

"""The store's users are killed at every kind of step, and work side by side: it stays whole."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

import pytest

from ringfence.image import Digest, Store, garbage, rootfs
from ringfence.image.archives import import_images
from ringfence.image.export import export_images
from tests.unit.image.images import files, layer, member, store_image

if TYPE_CHECKING:
    from pathlib import Path

# Python reports these calls, to a hook that can't be taken away again: so only a child has it.
WATCHED = frozenset(
    {
        "open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.symlink",
        "os.chmod", "os.utime", "fcntl.flock", "os.truncate", "os.setxattr", "os.scandir",
    },
)  # fmt: skip


def scenario(root: Path, archive: Path, *, last: bool = True) -> None:
    """What a user of the store does."""
    store = Store(root)
    import_images(store, archive)
    image = store.get("app:1")
    store.rootfs(image).close()
    store.disk(image)
    store.tag("app:1", "app:2")
    if last:
        store.remove("app:1")
    store.prune(timeout_s=60)


def in_child(root: Path, archive: Path, deadly: int, *, last: bool = True) -> int:
    """Start the scenario in a child, which kills itself before its n-th watched call."""
    child = os.fork()
    if child:
        return child
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event in WATCHED:
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        scenario(root, archive, last=last)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    assert {garbage.__name__, rootfs.__name__}  # imported now, for the child not to
    store = Store(tmp_path / "origin")
    lower = files({f"d/{number}": b"%d" % number * 1000 for number in range(8)})
    upper = layer([member("d/.wh.0"), (member("new"), b"new" * 1000)])
    store_image(store, "app:1", [lower, upper], cmd=("x",))
    export_images(store, ["app:1"], tmp_path / "app.tar")
    return tmp_path / "app.tar"


def check(store: Store) -> None:
    """Whatever is seen is whole."""
    for digest in store.blobs.digests():
        assert Digest.of(store.blobs.path(digest).read_bytes()) == digest
    for folder in (store.root / "layers").iterdir():
        names = {str(p.relative_to(folder)) for p in folder.rglob("*")}
        lower = {"diff", "lease", "diff/d", *(f"diff/d/{number}" for number in range(8))}
        upper = {"diff", "lease", "diff/d", "diff/d/0", "diff/new"}
        assert names in (lower, upper), "a layer is incomplete"
    for tag in store.tags:
        image = store.load(tag.target, tag.name)
        assert all(store.blobs.has(blob.digest) for blob in image.manifest.blobs)


@pytest.mark.slow
def test_killed_at_any_step_nothing_half_is_seen(tmp_path: Path, archive: Path) -> None:
    deadly = 0
    while True:
        deadly += 1
        root = tmp_path / f"store-{deadly}"
        status = os.waitpid(in_child(root, archive, deadly), 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not (root / "tmp").exists():
            continue  # it died before it had made the store
        store = Store(root)
        check(store)
        # Nothing that the dead left is in the way, and nothing of it stays.
        scenario(root, archive)
        assert [tag.name for tag in store.tags] == ["docker.io/library/app:2"]
        assert not list((root / "tmp").iterdir())
        assert not list((root / "partial").iterdir())
        check(store)
    assert deadly > 70


def test_side_by_side(tmp_path: Path, archive: Path) -> None:
    root = tmp_path / "store"
    children = [in_child(root, archive, -1, last=False) for _ in range(6)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    store = Store(root)
    check(store)
    with store.rootfs(store.get("app:2")) as tree:
        assert (tree.layers[-1] / "new").read_bytes() == b"new" * 1000
    assert len(list((root / "layers").iterdir())) == 2

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, FormatError, NotFoundError, StateError
from ringfence.image import Digest, Store
from ringfence.image.archives import import_images
from ringfence.image.export import ArchiveFormat, export_images
from ringfence.image.locking import try_lock
from ringfence.image.manifests import Descriptor
from tests.unit.image.images import files, store_image

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_image_is_found_by_name_and_digits(store: Store) -> None:
    manifest = store_image(store, "app:1", [files({"a": b"1"})], env=("A=1",))
    image = store.get("app:1")
    assert image.config.env == ("A=1",)
    assert image.manifest == manifest
    for digits in (image.id.hex[:8], str(image.digest), image.digest.hex[:12]):
        assert store.get(digits).id == image.id
    with pytest.raises(NotFoundError, match="no image 'other'"):
        store.get("other")


def test_tag_and_remove(store: Store) -> None:
    store_image(store, "app:1", [files({"a": b"1"})])
    store.tag("app:1", "app:2")
    assert store.remove("app:1") == "docker.io/library/app:1"
    assert store.get("app:2").name == "docker.io/library/app:2"
    with pytest.raises(NotFoundError):
        store.remove("app:1")


def test_layers_are_shared_and_stacked(store: Store) -> None:
    base = files({"a": b"1"})
    store_image(store, "one", [base])
    store_image(store, "two", [base, files({"b": b"2"})])
    with store.rootfs(store.get("one")) as one, store.rootfs(store.get("two")) as two:
        assert one.layers[0] == two.layers[0]
        assert (two.layers[1] / "b").read_bytes() == b"2"


def test_a_layer_that_comes_twice_is_taken_once(store: Store) -> None:
    base = files({"a": b"1"})
    store_image(store, "twice", [base, files({"b": b"2"}), base])
    with store.rootfs(store.get("twice")) as tree:
        assert [sorted(p.name for p in layer.iterdir()) for layer in tree.layers] == [["b"], ["a"]]


def test_wrong_diff_id_is_refused_and_leaves_nothing(store: Store) -> None:
    store_image(store, "bad", [files({"a": b"1"})], diff_ids=(Digest.of(b"other"),))
    with pytest.raises(FormatError, match="but the image says"):
        store.rootfs(store.get("bad"))
    assert list((store.root / "layers").iterdir()) == []
    assert list((store.root / "tmp").iterdir()) == []


def test_changed_blob_is_noticed(store: Store) -> None:
    manifest = store_image(store, "app", [files({"a": b"1"})])
    path = store.blobs.path(manifest.config.digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"amd64", b"amd65"))
    with pytest.raises(FormatError, match="no longer has its digest"):
        store.get("app")


def test_blob_with_wrong_digest_is_thrown_away(store: Store) -> None:
    wanted = Descriptor(media_type="x", digest=Digest.of(b"right"), size=5)
    with store.blobs.resume(wanted) as writer:
        assert writer is not None
        writer.write(b"wrong")
        with pytest.raises(FormatError, match="arrived as"):
            writer.commit(wanted)
    assert not store.blobs.has(wanted.digest)
    assert [p.suffix for p in (store.root / "partial").iterdir()] == [".lock"]


def test_download_goes_on_where_it_ended(store: Store) -> None:
    wanted = Descriptor(media_type="x", digest=Digest.of(b"one two"), size=7)
    with store.blobs.resume(wanted) as writer:
        assert writer is not None
        writer.write(b"one ")
    with store.blobs.resume(wanted) as writer:
        assert writer is not None
        assert writer.size == 4
        writer.write(b"two")
        writer.commit(wanted)
    assert store.blobs.read(wanted.digest) == b"one two"


def test_prune_keeps_what_names_lead_to(store: Store) -> None:
    base = files({"a": b"1"})
    store_image(store, "keep", [base])
    store_image(store, "drop", [base, files({"b": b"2"})])
    store.rootfs(store.get("drop")).close()
    store.remove("drop")
    (store.root / "tmp" / "left").write_bytes(b"x")
    done = store.prune()
    assert (done.blobs, done.layers) == (3, 1)
    assert list((store.root / "tmp").iterdir()) == []
    with store.rootfs(store.get("keep")) as tree:
        assert (tree.layers[0] / "a").read_bytes() == b"1"


def test_prune_spares_layers_in_use(store: Store) -> None:
    store_image(store, "app", [files({"a": b"1"})])
    tree = store.rootfs(store.get("app"))
    store.remove("app")
    assert store.prune().layers == 0
    tree.close()
    assert store.prune().layers == 1


def test_prune_every_spares_images_in_use(store: Store) -> None:
    store_image(store, "used", [files({"a": b"1"})])
    store_image(store, "idle", [files({"b": b"2"})])
    with store.rootfs(store.get("used")):
        assert store.prune(every=True).names == ("docker.io/library/idle:latest",)
    assert store.get("used").name == "docker.io/library/used:latest"


def test_prune_waits_for_users(store: Store) -> None:
    with store.using(), pytest.raises(StateError, match="another process uses"):
        store.prune(timeout_s=0.0)
    held = try_lock(store.root / "lock", shared=True)
    assert held is not None
    os.close(held)
    store.prune(timeout_s=0.0)


@pytest.mark.parametrize("archive", list(ArchiveFormat))
def test_archives_there_and_back(store: Store, tmp_path: Path, archive: ArchiveFormat) -> None:
    store_image(store, "app:1", [files({"a": b"1"}), files({"b": b"2"})], cmd=("x",))
    out = tmp_path / "out"
    export_images(store, ["app:1"], out, archive)
    other = Store(tmp_path / "other")
    (tag,) = import_images(other, out)
    image = other.get(tag.name)
    assert tag.name == "docker.io/library/app:1"
    assert image.id == store.get("app:1").id
    with other.rootfs(image) as tree:
        assert (tree.layers[1] / "b").read_bytes() == b"2"


def test_equal_images_give_equal_archives(store: Store, tmp_path: Path) -> None:
    store_image(store, "app:1", [files({"a": b"1"})])
    for name in ("one", "two"):
        export_images(store, ["app:1"], tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_archive_with_a_false_digest_is_refused(store: Store, tmp_path: Path) -> None:
    store_image(store, "app:1", [files({"a": b"1"})])
    out = tmp_path / "out.tar"
    export_images(store, ["app:1"], out)
    data = bytearray(out.read_bytes())
    at = data.index(b'"architecture"')
    data[at + 1] ^= 1
    out.write_bytes(data)
    with pytest.raises(FormatError, match="has the digest"):
        import_images(Store(tmp_path / "other"), out)


def test_other_files_are_refused(store: Store, tmp_path: Path) -> None:
    plain = tmp_path / "x.tar"
    plain.write_bytes(files({"etc/passwd": b"root"}))
    with pytest.raises(FormatError, match="neither"):
        import_images(store, plain)
    with pytest.raises(FormatError, match="not an OCI layout"):
        import_images(store, tmp_path)
    with pytest.raises(NotFoundError):
        import_images(store, tmp_path / "none")
    with pytest.raises(ConfigError):
        import_images(store, plain, "Bad Name")

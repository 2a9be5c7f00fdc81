"""skopeo, umoci and podman read what we write, and the other way round."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ringfence.image import Store
from ringfence.image.archives import import_images
from ringfence.image.create import from_tar
from ringfence.image.export import ArchiveFormat, export_images
from tests.functional.image.conftest import PASSWORD, USER
from tests.unit.image.images import files, layer, member, store_image

NAME = "docker.io/library/app:1"


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (apt install {program})")


def tool(*words: str | Path, folder: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def podman(folder: Path, *words: str | Path) -> str:
    roots: list[str | Path] = ["--root", folder / "root", "--runroot", folder / "run"]
    return tool("podman", *roots, "--storage-driver", "vfs", *words)


@pytest.fixture
def made(store: Store) -> Store:
    lower = files({"etc/a": b"lower", "etc/gone": b"gone"})
    upper = layer([(member("etc/b", mode=0o600, uid=5, gid=6), b"upper"), member("etc/.wh.gone")])
    store_image(store, NAME, [lower, upper], cmd=("/bin/x",), env=("A=1",))
    return store


@pytest.mark.parametrize("archive", list(ArchiveFormat))
def test_skopeo_reads_our_archives(made: Store, tmp_path: Path, archive: ArchiveFormat) -> None:
    need("skopeo")
    out = tmp_path / "out"
    export_images(made, [NAME], out, archive)
    reference = f"{archive.value}:{out}" + (
        ":1" if archive is not ArchiveFormat.DOCKER_ARCHIVE else ""
    )
    found = json.loads(tool("skopeo", "inspect", "--config", reference))
    assert found["config"]["Cmd"] == ["/bin/x"]
    tool("skopeo", "copy", reference, f"dir:{tmp_path / 'copy'}")


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive"])
def test_we_read_skopeos_archives(made: Store, tmp_path: Path, transport: str) -> None:
    need("skopeo")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    export_images(made, [NAME], ours)
    tool("skopeo", "copy", f"oci-archive:{ours}:1", f"{transport}:{theirs}:{NAME}")
    other = Store(tmp_path / "other")
    (tag,) = import_images(other, theirs)
    assert tag.name == NAME
    assert other.get(NAME).config.diff_ids == made.get(NAME).config.diff_ids
    with other.rootfs(other.get(NAME)) as tree:
        assert (tree.layers[1] / "etc/b").read_bytes() == b"upper"


def test_umoci_unpacks_our_layout(made: Store, tmp_path: Path) -> None:
    need("umoci")
    out = tmp_path / "layout"
    export_images(made, [NAME], out, ArchiveFormat.OCI)
    bundle = tmp_path / "bundle"
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    tool("umoci", "unpack", *rootless, "--image", f"{out}:1", bundle)
    assert (bundle / "rootfs/etc/b").read_bytes() == b"upper"
    assert not (bundle / "rootfs/etc/gone").exists()


def test_we_read_umocis_layout(store: Store, tmp_path: Path) -> None:
    need("umoci")
    layout = tmp_path / "layout"
    tool("umoci", "init", "--layout", layout)
    tool("umoci", "new", "--image", f"{layout}:1")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("by umoci")
    tool("umoci", "insert", "--rootless", "--image", f"{layout}:1", tmp_path / "tree", "/put")
    (tag,) = import_images(store, layout, "theirs:1")
    with store.rootfs(store.get(tag.name)) as tree:
        assert (tree.layers[-1] / "put/file").read_text() == "by umoci"


@pytest.mark.root
@pytest.mark.slow
def test_podman_loads_ours_and_we_load_podmans(made: Store, tmp_path: Path) -> None:
    need("podman")
    if os.geteuid() != 0:
        pytest.skip("podman's store needs root here")
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    # podman takes 50 characters at most.
    place = Path(tempfile.mkdtemp(prefix="rf-images-"))
    try:
        for archive in (ArchiveFormat.OCI_ARCHIVE, ArchiveFormat.DOCKER_ARCHIVE):
            export_images(made, [NAME], ours, archive)
            podman(place, "load", "-q", "-i", ours)
            found = json.loads(podman(place, "image", "inspect", NAME))
            assert found[0]["Config"]["Env"] == ["A=1"]
            ours.unlink()
        for form in ("oci-archive", "docker-archive"):
            podman(place, "save", "-q", "--format", form, "-o", theirs, NAME)
            other = Store(tmp_path / form)
            (tag,) = import_images(other, theirs)
            assert other.get(tag.name).config.diff_ids == made.get(NAME).config.diff_ids
            theirs.unlink()
    finally:
        podman(place, "system", "reset", "--force")
        shutil.rmtree(place, ignore_errors=True)


def test_registry_with_skopeo(made: Store, tmp_path: Path, closed_registry: str) -> None:
    need("skopeo")
    out = tmp_path / "out"
    export_images(made, [NAME], out)
    auth = tmp_path / "auth.json"
    tool("skopeo", "login", "--authfile", auth, "--tls-verify=false", "-u", USER, "-p", PASSWORD,
         closed_registry)  # fmt: skip
    os.environ["REGISTRY_AUTH_FILE"] = str(auth)
    try:
        theirs = f"{closed_registry}/by/skopeo:1"
        tool(
            "skopeo",
            "copy",
            "--dest-tls-verify=false",
            f"oci-archive:{out}:1",
            f"docker://{theirs}",
        )
        assert made.pull(theirs, plain_http=True).id == made.get(NAME).id
        ours = f"{closed_registry}/by/us:1"
        digest = made.push(NAME, ours, plain_http=True)
        found = tool("skopeo", "inspect", "--tls-verify=false", f"docker://{ours}")
        assert json.loads(found)["Digest"] == str(digest)
        # Docker's schema 2, as older tools push it.
        tool("skopeo", "copy", "--format=v2s2", "--src-tls-verify=false", "--dest-tls-verify=false",
             f"docker://{ours}", f"docker://{closed_registry}/by/schema2:1")  # fmt: skip
        image = made.pull(f"{closed_registry}/by/schema2:1", plain_http=True)
        assert "docker.distribution" in image.manifest.media_type
        made.rootfs(image).close()
    finally:
        del os.environ["REGISTRY_AUTH_FILE"]


@pytest.mark.parametrize("form", ["zstd", "zstd:chunked"])
def test_zstd_layers(made: Store, tmp_path: Path, open_registry: str, form: str) -> None:
    need("buildah")
    out = tmp_path / "out"
    export_images(made, [NAME], out)
    roots = ["--root", str(tmp_path / "b"), "--runroot", str(tmp_path / "br"),
             "--storage-driver", "vfs"]  # fmt: skip
    name = f"{open_registry}/zstd/{form.replace(':', '-')}:1"
    identity = tool("buildah", *roots, "pull", "-q", f"oci-archive:{out}:1").split()[-1]
    tool("buildah", *roots, "push", "--tls-verify=false", "--compression-format", form,
         "--format", "oci", identity, f"docker://{name}")  # fmt: skip
    image = made.pull(name, plain_http=True)
    assert {blob.media_type.rpartition("+")[2] for blob in image.manifest.layers} == {"zstd"}
    with made.rootfs(image) as tree:
        assert (tree.layers[0] / "etc/a").read_bytes() == b"lower"


def test_concatenated_gzip_and_padding(store: Store, tmp_path: Path) -> None:
    tar = files({"a": b"x" * 100_000})
    data = gzip.compress(tar[:50_000]) + gzip.compress(tar[50_000:]) + bytes(1024)
    (tmp_path / "t.tar.gz").write_bytes(data)
    image = from_tar(store, tmp_path / "t.tar.gz", "app")
    with store.rootfs(image) as tree:
        assert (tree.layers[0] / "a").stat().st_size == 100_000

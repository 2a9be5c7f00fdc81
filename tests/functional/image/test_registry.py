"""Pull and push against Debian's docker-registry."""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, FormatError, HostError, NotFoundError
from ringfence.image import Platform, Store
from ringfence.image.manifests import Descriptor, Index
from tests.functional.image.conftest import PASSWORD, USER
from tests.unit.image.images import files, store_image

if TYPE_CHECKING:
    from ringfence.image.transfer import Progress


def write_auth(home: Path, document: object) -> None:
    (home / ".docker").mkdir(exist_ok=True)
    (home / ".docker" / "config.json").write_text(json.dumps(document))


def basic() -> str:
    return base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def test_there_and_back(store: Store, tmp_path: Path, open_registry: str) -> None:
    name = f"{open_registry}/team/app:1"
    big = files({"big": random.Random(1).randbytes(3_000_000)})
    store_image(store, name, [files({"a": b"1"}), big], env=("A=1",))
    digest = store.push(name, plain_http=True)

    told: list[Progress] = []
    other = Store(tmp_path / "other")
    image = other.pull(name, plain_http=True, progress=told.append)
    assert image.digest == digest == store.get(name).digest
    with other.rootfs(image) as tree:
        assert (tree.layers[0] / "a").read_bytes() == b"1"
    assert {(p.digest, p.total) for p in told if p.done == p.total} == {
        (blob.digest, blob.size) for blob in image.manifest.blobs
    }
    # A second time nothing is fetched.
    told.clear()
    other.pull(name, plain_http=True, progress=told.append)
    assert {p.note for p in told} == {"exists"}


def test_by_digest(store: Store, tmp_path: Path, open_registry: str) -> None:
    name = f"{open_registry}/team/dig:1"
    store_image(store, name, [files({"a": b"2"})])
    digest = store.push(name, plain_http=True)
    other = Store(tmp_path / "other")
    pinned = f"{open_registry}/team/dig@{digest}"
    assert other.pull(pinned, plain_http=True).digest == digest
    assert other.get(pinned).digest == digest


def test_blobs_are_mounted_from_another_repository(store: Store, open_registry: str) -> None:
    base = files({"shared": b"mounted" * 1000})
    store_image(store, f"{open_registry}/m/one:1", [base])
    store.push(f"{open_registry}/m/one:1", plain_http=True)
    store_image(store, f"{open_registry}/m/two:1", [base, files({"b": b"own"})])
    told: list[Progress] = []
    store.push(f"{open_registry}/m/two:1", plain_http=True, progress=told.append)
    assert [p.note for p in told].count("mounted") == 1


def test_index_is_pushed_whole(store: Store, tmp_path: Path, open_registry: str) -> None:
    name = f"{open_registry}/multi:1"
    manifests = [store_image(store, f"x{n}", [files({"n": b"%d" % n})]) for n in (1, 2)]
    entries = tuple(
        Descriptor(
            media_type=m.media_type,
            digest=m.descriptor.digest,
            size=len(m.raw),
            platform=Platform.parse(platform),
        )
        for m, platform in zip(manifests, ("linux/amd64", "linux/arm64"), strict=True)
    )
    with store.using():
        store.add(Index.build(entries), name)
    store.push(name, plain_http=True)
    other = Store(tmp_path / "other")
    arm = other.pull(name, plain_http=True, platform=Platform.parse("arm64"))
    assert arm.manifest == manifests[1]
    with pytest.raises(NotFoundError, match=r"nothing for linux/s390x; it has linux/amd64"):
        other.pull(name, plain_http=True, platform=Platform.parse("s390x"))


def test_unencrypted_only_when_told(store: Store, open_registry: str) -> None:
    with pytest.raises(HostError, match="cannot reach") as caught:
        store.pull(f"{open_registry}/team/app:1")
    assert "--plain-http" in caught.value.hint


def test_what_is_missing_is_said(store: Store, open_registry: str) -> None:
    with pytest.raises(NotFoundError, match="manifest unknown"):
        store.pull(f"{open_registry}/none:1", plain_http=True)
    with pytest.raises(HostError, match="cannot reach"):
        store.pull("127.0.0.1:1/none:1", plain_http=True)


def test_password(store: Store, home: Path, closed_registry: str) -> None:
    name = f"{closed_registry}/app:1"
    store_image(store, name, [files({"a": b"1"})])
    with pytest.raises(ConfigError, match="wants a name and a password"):
        store.push(name, plain_http=True)
    wrong = base64.b64encode(b"user:wrong").decode()
    write_auth(home, {"auths": {closed_registry: {"auth": wrong}}})
    with pytest.raises(ConfigError, match="refused"):
        store.push(name, plain_http=True)
    write_auth(home, {"auths": {f"http://{closed_registry}/v2/": {"auth": basic()}}})
    store.push(name, plain_http=True)
    assert store.pull(name, plain_http=True).digest == store.get(name).digest


def test_credential_helper(
    store: Store,
    home: Path,
    tmp_path: Path,
    closed_registry: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    helper = tmp_path / "bin" / "docker-credential-mine"
    helper.parent.mkdir()
    helper.write_text(
        f'#!/bin/sh\n[ "$1" = get ] && [ "$(cat)" = "{closed_registry}" ] || exit 1\n'
        f'echo \'{{"Username":"{USER}","Secret":"{PASSWORD}"}}\'\n',
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    write_auth(home, {"credHelpers": {closed_registry: "mine"}})
    name = f"{closed_registry}/helped:1"
    store_image(store, name, [files({"a": b"1"})])
    store.push(name, plain_http=True)
    write_auth(home, {"credsStore": "mine"})
    assert store.pull(name, plain_http=True).digest == store.get(name).digest
    write_auth(home, {"credsStore": "absent"})
    with pytest.raises(ConfigError, match="docker-credential-absent is configured"):
        store.pull(name, plain_http=True)


def test_mirror_is_asked_first(
    store: Store,
    tmp_path: Path,
    open_registry: str,
) -> None:
    name = f"{open_registry}/mirrored:1"
    store_image(store, name, [files({"a": b"mirror"})])
    digest = store.push(name, plain_http=True)
    settings = tmp_path / "rf" / "config" / "registries.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        '[registry."origin.invalid"]\n'
        f'mirrors = ["http://127.0.0.1:1", "http://{open_registry}"]\n',
    )
    other = Store(tmp_path / "other")
    assert other.pull("origin.invalid/mirrored:1").digest == digest


def test_a_changed_blob_is_refused(tmp_path: Path, store: Store, open_registry: str) -> None:
    name = f"{open_registry}/changed:1"
    manifest = store_image(store, name, [files({"a": b"to be changed"})])
    store.push(name, plain_http=True)
    digest = manifest.layers[0].digest
    folder = next(p for p in Path(tmp_path.parent).glob("registry*/data") if p.is_dir())
    data = folder / f"docker/registry/v2/blobs/sha256/{digest.hex[:2]}/{digest.hex}/data"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    with pytest.raises(FormatError, match="arrived as"):
        Store(tmp_path / "other").pull(name, plain_http=True)

"""Small images made by the standard library's tar module: what ours is held against."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING

from ringfence.image import Digest, ImageConfig, Platform, Store
from ringfence.image.manifests import Descriptor, Manifest, MediaType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    """A member with the fields given."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def layer(members: Iterable[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar of them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for item in members:
            info, data = item if isinstance(item, tuple) else (item, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def files(contents: Mapping[str, bytes]) -> bytes:
    """A tar of plain files."""
    return layer((member(name), data) for name, data in contents.items())


def store_image(store: Store, name: str, layers: list[bytes], **config: object) -> Manifest:
    """Put an image of these tars, compressed with gzip, into the store."""
    blobs: list[Descriptor] = []
    with store.using():
        for tar in layers:
            data = gzip.compress(tar, mtime=0)
            store.blobs.put(data)
            blobs.append(Descriptor.of(data, MediaType.OCI_LAYER_GZIP))
        made = ImageConfig(
            platform=Platform.host(),
            diff_ids=tuple(Digest.of(tar) for tar in layers),
        )
        raw = replace(made, **config).dump()  # type: ignore[arg-type]
        store.blobs.put(raw)
        manifest = Manifest.build(Descriptor.of(raw, MediaType.OCI_CONFIG), tuple(blobs))
        store.add(manifest, name)
    return manifest

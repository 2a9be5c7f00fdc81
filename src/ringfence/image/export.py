"""Images written to files: OCI layouts (directory or tar) and docker-archive tarballs."""

from __future__ import annotations

import enum
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ringfence.errors import ConflictError, HostError
from ringfence.image import jsonio
from ringfence.image.compression import Decompressed
from ringfence.image.manifests import Descriptor, Index, Manifest, MediaType, parse_document
from ringfence.image.references import Digest, Reference
from ringfence.image.tarformat import Entry, Kind
from ringfence.image.tarwrite import TarWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ringfence.image.jsonio import Json
    from ringfence.image.store import Image, Store

__all__ = ["ArchiveFormat", "export_images"]

_CHUNK = 1 << 20
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


class ArchiveFormat(enum.Enum):
    """How images are written."""

    OCI_ARCHIVE = "oci-archive"
    """A tar of an OCI layout."""
    OCI = "oci"
    """A directory with an OCI layout; added to when it is one already."""
    DOCKER_ARCHIVE = "docker-archive"
    """What ``docker load`` reads."""


def export_images(
    store: Store,
    names: Sequence[str],
    destination: Path | BinaryIO,
    archive: ArchiveFormat = ArchiveFormat.OCI_ARCHIVE,
) -> None:
    """Write images to a file, a pipe or a directory. Equal images give equal bytes.

    Args:
        store: Where from.
        names: Which images.
        destination: A path that doesn't exist (`OCI`: or is a layout), or a file open for writing.
        archive: How.

    Raises:
        NotFoundError: There is no such image.
        ConflictError: The path exists.
        HostError: It can't be written.
    """
    with store.using():
        images = [store.get(name) for name in names]
        if not isinstance(destination, Path):
            _archive(store, images, destination, archive)
            return
        if archive is ArchiveFormat.OCI:
            _directory(store, images, destination)
            return
        work = destination.with_name(f".{destination.name}.part")
        try:
            if destination.exists():
                msg = f"{destination} exists"
                raise ConflictError(msg, hint=f"rm {destination}")
            with work.open("wb") as file:
                _archive(store, images, file, archive)
            work.rename(destination)
        except OSError as error:
            if isinstance(error, HostError):
                raise
            msg = f"cannot write {destination}: {error.strerror}"
            raise HostError(msg, errno=error.errno, path=str(destination)) from error
        finally:
            work.unlink(missing_ok=True)


def _archive(
    store: Store,
    images: Sequence[Image],
    file: BinaryIO,
    archive: ArchiveFormat,
) -> None:
    writer = TarWriter(file)
    if archive is ArchiveFormat.DOCKER_ARCHIVE:
        _docker(store, images, writer)
    else:
        _document(writer, "oci-layout", _LAYOUT)
        _document(writer, "index.json", Index.build(tuple(map(_entry, images))).raw)
        for blob in _blobs(store, images):
            with store.blobs.open(blob.digest) as source:
                _member(writer, f"blobs/{blob.digest.algorithm}/{blob.digest.hex}", source)
    writer.finish()


def _entry(image: Image) -> Descriptor:
    """The image in a layout's index, with its name both as containerd and as the standard say."""
    annotations: dict[str, str] = {}
    if not image.name.startswith("sha256:"):
        reference = Reference.parse(image.name)
        annotations = {
            "io.containerd.image.name": image.name,
            "org.opencontainers.image.ref.name": reference.tag or image.name,
        }
    target = image.target
    return Descriptor(
        media_type=target.media_type,
        digest=target.digest,
        size=target.size,
        annotations=annotations,
    )


def _blobs(store: Store, images: Sequence[Image]) -> list[Descriptor]:
    """All blobs of the images that are here, each once."""
    found: dict[Digest, Descriptor] = {}

    def add(target: Descriptor) -> None:
        if target.digest in found or not store.blobs.has(target.digest):
            return
        found[target.digest] = target
        document = parse_document(store.blobs.read(target.digest), target.media_type)
        if isinstance(document, Manifest):
            found.update((b.digest, b) for b in document.blobs if store.blobs.has(b.digest))
            return
        for entry in document.manifests:
            add(entry)

    for image in images:
        add(image.target)
    return list(found.values())


def _document(writer: TarWriter, name: str, data: bytes) -> None:
    entry = Entry(name.encode(), Kind.FILE)
    entry.mode, entry.size = 0o644, len(data)
    writer.add(entry, [data])


def _member(writer: TarWriter, name: str, source: BinaryIO) -> None:
    entry = Entry(name.encode(), Kind.FILE)
    entry.mode = 0o644
    entry.size = source.seek(0, 2)
    source.seek(0)
    writer.add(entry, _pieces(source))


def _pieces(source: BinaryIO) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk


def _docker(store: Store, images: Sequence[Image], writer: TarWriter) -> None:
    manifest: list[Json] = []
    done: set[str] = set()
    for image in images:
        config = f"{image.id.hex}.json"
        if config not in done:
            _document(writer, config, store.blobs.read(image.id))
            done.add(config)
        layers: list[Json] = []
        for blob, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True):
            path = f"{diff_id.hex}.tar"
            layers.append(path)
            if path not in done:
                _uncompressed(store, blob, path, writer)
                done.add(path)
        named = not image.name.startswith("sha256:") and Reference.parse(image.name).tag
        tags: list[Json] = [Reference.parse(image.name).familiar] if named else []
        manifest.append({"Config": config, "RepoTags": tags, "Layers": layers})
    body = b",".join(jsonio.dump(entry) for entry in manifest if isinstance(entry, dict))
    _document(writer, "manifest.json", b"[" + body + b"]")


def _uncompressed(store: Store, blob: Descriptor, path: str, writer: TarWriter) -> None:
    """A layer's tar; its length must be known first, so it is laid down beside."""
    work = store.blobs.temporary()
    try:
        with work.open("w+b") as plain:
            with store.blobs.open(blob.digest) as file, Decompressed(file, store.limits) as pieces:
                for piece in pieces:
                    plain.write(piece)
            _member(writer, path, plain)
    finally:
        work.unlink(missing_ok=True)


def _directory(store: Store, images: Sequence[Image], folder: Path) -> None:
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / "oci-layout").is_file():
            msg = f"{folder} exists and is no OCI layout"
            raise ConflictError(msg, hint="choose another place")
        (folder / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        for blob in _blobs(store, images):
            target = folder / "blobs" / blob.digest.algorithm / blob.digest.hex
            if not target.exists():
                part = target.with_name(f".{target.name}.part")
                shutil.copyfile(store.blobs.path(blob.digest), part)
                part.rename(target)
        (folder / "oci-layout").write_bytes(_LAYOUT)
        old: list[Descriptor] = []
        index = folder / "index.json"
        new = [_entry(image) for image in images]
        if index.exists():
            before = parse_document(index.read_bytes(), MediaType.OCI_INDEX, str(index))
            if isinstance(before, Index):
                replaced = [entry.annotations for entry in new]
                old = [e for e in before.manifests if e.annotations not in replaced]
        part = index.with_name(".index.json.part")
        part.write_bytes(Index.build((*old, *new)).raw)
        part.rename(index)
    except OSError as error:
        if isinstance(error, HostError):
            raise
        msg = f"cannot write {folder}: {error.strerror}"
        raise HostError(msg, errno=error.errno, path=str(folder)) from error

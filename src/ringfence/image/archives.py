"""Images in files: OCI layouts (directory or tar) and docker-archive tarballs, read and written.

Reading takes one pass, from a pipe too: each member becomes a blob as it comes by, and what the
archive is shows at its end.

Source: OCI image specification 1.1, image-layout.md; Docker's ``docker save`` format 1.2.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ringfence.errors import ConfigError, FormatError, HostError, NotFoundError
from ringfence.image import jsonio
from ringfence.image.compression import Decompressed, Peekable, compression_of
from ringfence.image.config import ImageConfig
from ringfence.image.manifests import Descriptor, Index, Manifest, MediaType, parse_document
from ringfence.image.references import Digest, Reference
from ringfence.image.tar import TarReader
from ringfence.image.tarformat import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.image.blobs import BlobStore
    from ringfence.image.store import Store
    from ringfence.image.tags import Tag

__all__ = ["import_images"]

_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Member:
    digest: Digest
    size: int


def import_images(store: Store, source: Path | BinaryIO, name: str | None = None) -> list[Tag]:
    """Bring images from an OCI layout or a docker-archive.

    Args:
        store: Where to.
        source: A layout's directory, an archive (compressed or not), or an open file of one,
            which may be a pipe.
        name: What to call the image; only where there is one. By default each has the name that
            the archive gives it, or none.

    Returns:
        The names, one an image.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It is neither format, or a digest is wrong.
        ConfigError: `name` is no reference, or there are several images.
    """
    if name is not None:
        Reference.parse(name)
    with store.using():
        if isinstance(source, Path):
            if source.is_dir():
                return _from_directory(store, source, name)
            try:
                file = source.open("rb")
            except FileNotFoundError as error:
                msg = f"there is no {source}"
                raise NotFoundError(msg) from error
            except OSError as error:
                msg = f"cannot read {source}: {error.strerror}"
                raise HostError(msg, errno=error.errno, path=str(source)) from error
            with file:
                return _from_archive(store, file, name, str(source))
        return _from_archive(store, source, name, "the archive")


def _from_directory(store: Store, folder: Path, name: str | None) -> list[Tag]:
    layout = folder / "oci-layout"
    if not layout.is_file():
        msg = f"{folder} is not an OCI layout: it has no file oci-layout"
        hint = "to make an image of a directory's files: ringfence image create --from-dir"
        raise FormatError(msg, hint=hint)
    index = parse_document((folder / "index.json").read_bytes(), MediaType.OCI_INDEX, str(folder))
    if not isinstance(index, Index):
        msg = f"{folder}/index.json is not an index"
        raise FormatError(msg)

    def bring(wanted: Descriptor) -> bool:
        if store.blobs.has(wanted.digest):
            return True
        path = folder / "blobs" / wanted.digest.algorithm / wanted.digest.hex
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return False
        with file, store.blobs.resume(wanted) as writer:
            if writer is not None:
                writer.restart()
                while chunk := file.read(_CHUNK):
                    writer.write(chunk)
                writer.commit(wanted)
        return True

    return _Layout(store, bring, str(folder)).tags(index, name)


class _Layout:
    """The images of an OCI index, their blobs brought by `bring`."""

    def __init__(self, store: Store, bring: Callable[[Descriptor], bool], what: str) -> None:
        self._store = store
        self._bring = bring
        self._what = what

    def tags(self, index: Index, name: str | None) -> list[Tag]:
        entries = [
            e for e in index.manifests if e.media_type in MediaType.INDEXES | MediaType.MANIFESTS
        ]
        if not entries:
            msg = f"{self._what} has no image in it"
            raise FormatError(msg)
        if name is not None and len({entry.digest for entry in entries}) > 1:
            msg = f"{self._what} has {len(entries)} images; one name can't serve them all"
            raise ConfigError(msg, hint="leave the name out")
        found: list[Tag] = []
        for entry in entries:
            if not self._bring_all(entry):
                msg = f"{self._what} lacks blobs of the image {entry.digest}"
                raise FormatError(msg)
            full = name or _own_name(entry)
            label = str(Reference.parse(full)) if full else str(entry.digest)
            target = Descriptor(
                media_type=entry.media_type,
                digest=entry.digest,
                size=entry.size,
            )
            found.append(self._store.tags.set(label, target))
        return found

    def _bring_all(self, target: Descriptor, depth: int = 0) -> bool:
        """Bring an image; of an index, the entries that are there, at least one."""
        if depth > 4 or not self._bring(target):
            return False
        document = parse_document(
            self._store.blobs.read(target.digest),
            target.media_type,
            self._what,
        )
        if isinstance(document, Index):
            return sum(self._bring_all(entry, depth + 1) for entry in document.manifests) > 0
        return all(self._bring(blob) for blob in document.blobs)


def _own_name(entry: Descriptor) -> str | None:
    """The full name that a layout gives an image; a tag alone is none."""
    for key in _NAMES:
        text = entry.annotations.get(key, "")
        if "/" in text or ":" in text:
            with contextlib.suppress(ConfigError):
                Reference.parse(text)
                return text
    return None


def _from_archive(store: Store, file: BinaryIO, name: str | None, what: str) -> list[Tag]:
    members, links = _take_members(store, Peekable(file))
    for path, target in links.items():
        if target in members:
            members[path] = members[target]
    blobs = store.blobs
    if "index.json" in members and "oci-layout" in members:
        index = parse_document(blobs.read(members["index.json"].digest), what=what)
        if not isinstance(index, Index):
            msg = f"{what}: index.json is not an index"
            raise FormatError(msg)
        return _Layout(store, lambda wanted: blobs.has(wanted.digest), what).tags(index, name)
    if "manifest.json" in members:
        return _from_docker(store, members, name, what)
    msg = f"{what} is neither an OCI layout nor a docker-archive"
    hint = "to make an image of a root file system's tar: ringfence image create --from-tar"
    raise FormatError(msg, hint=hint)


def _take_members(
    store: Store,
    file: Peekable,
) -> tuple[dict[str, _Member], dict[str, str]]:
    """All files of an archive as blobs, by their name; and its links."""
    members: dict[str, _Member] = {}
    links: dict[str, str] = {}
    with Decompressed(file, store.limits, compression_of(file.peek())) as pieces:
        reader = TarReader(pieces, store.limits)
        for entry in reader:
            path = entry.name.decode(errors="surrogateescape").removeprefix("./")
            if entry.kind in (Kind.SYMLINK, Kind.HARD_LINK):
                links[path] = _link_target(path, entry.link.decode(errors="surrogateescape"))
            if entry.kind != Kind.FILE:
                continue
            if len(members) > store.limits.entries:
                msg = f"the archive has more than {store.limits.entries} members"
                raise FormatError(msg)
            with store.blobs.writer() as writer:
                for view in reader.data():
                    writer.write(view)
                members[path] = _Member(writer.digest, writer.size)
                _check_blob(path, writer.digest)
                if not store.blobs.has(writer.digest):
                    writer.commit()
    return members, links


def _check_blob(path: str, digest: Digest) -> None:
    parts = path.split("/")
    if parts[:2] == ["blobs", digest.algorithm] and parts[2:] != [digest.hex]:
        msg = f"the archive's {path} has the digest {digest}"
        raise FormatError(msg)


def _link_target(path: str, target: str) -> str:
    """Docker links a layer to an equal one: ``../<id>/layer.tar``."""
    parts = path.split("/")[:-1]
    for part in target.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _from_docker(
    store: Store,
    members: dict[str, _Member],
    name: str | None,
    what: str,
) -> list[Tag]:
    raw = store.blobs.read(members["manifest.json"].digest)
    images = jsonio.objects(jsonio.load(b'{"images":' + raw + b"}", what), "images", what)
    if name is not None and len(images) > 1:
        msg = f"{what} has {len(images)} images; one name can't serve them all"
        raise ConfigError(msg, hint="leave the name out")
    found: list[Tag] = []
    for image in images:
        paths = [jsonio.text(image, "Config", what), *jsonio.field_list(image, "Layers", what)]
        missing = [path for path in paths if path not in members]
        if missing:
            msg = f"{what} lacks {missing[0]}"
            raise FormatError(msg)
        config = members[paths[0]]
        ImageConfig.parse(store.blobs.read(config.digest), f"{what}: {paths[0]}")
        manifest = Manifest.build(
            Descriptor(media_type=MediaType.OCI_CONFIG, digest=config.digest, size=config.size),
            tuple(_layer(store.blobs, members[path]) for path in paths[1:]),
        )
        names = [name] if name is not None else jsonio.field_list(image, "RepoTags", what)
        found += [store.add(manifest, full) for full in names] or [store.add(manifest, None)]
    return found


def _layer(blobs: BlobStore, member: _Member) -> Descriptor:
    kinds = {"gzip": MediaType.OCI_LAYER_GZIP, "zstd": MediaType.OCI_LAYER_ZSTD}
    with blobs.open(member.digest) as file:
        kind = compression_of(file.read(8))
    return Descriptor(
        media_type=kinds.get(kind, MediaType.OCI_LAYER),
        digest=member.digest,
        size=member.size,
    )

"""Descriptors, manifests and indexes: OCI 1.1 and Docker schema 2.

Documents keep the bytes they came as: the digest is over those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ringfence.errors import FormatError, NotFoundError, UnsupportedError
from ringfence.image import jsonio
from ringfence.image.platforms import Platform
from ringfence.image.references import Digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.image.jsonio import Json, JsonObject

__all__ = ["Descriptor", "Index", "Manifest", "MediaType", "parse_document"]


class MediaType:
    """The media types that are read and written."""

    OCI_INDEX = "application/vnd.oci.image.index.v1+json"
    OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
    OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
    OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
    OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
    OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
    DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
    DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
    DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
    DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
    DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

    INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
    MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
    CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A blob: what it is, its digest, its length.

    Args:
        media_type: What the blob holds.
        digest: Its name.
        size: Its length in bytes.
        platform: For manifests in an index.
        annotations: Free text by key.
        urls: Other places to fetch it from (foreign layers).
    """

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, obj: JsonObject, what: str) -> Descriptor:
        """Read one.

        Raises:
            FormatError: A field is missing or of the wrong type.
        """
        platform = jsonio.field_map(obj, "platform", what)
        annotations = jsonio.field_map(obj, "annotations", what)
        return cls(
            media_type=jsonio.text(obj, "mediaType", what),
            digest=Digest.parse(jsonio.text(obj, "digest", what)),
            size=jsonio.integer(obj, "size", what),
            platform=Platform.from_json(platform, what) if platform else None,
            annotations={key: str(value) for key, value in annotations.items()},
            urls=tuple(jsonio.field_list(obj, "urls", what)),
        )

    @classmethod
    def of(cls, data: bytes, media_type: str) -> Descriptor:
        """The descriptor of `data`."""
        return cls(media_type=media_type, digest=Digest.of(data), size=len(data))

    def to_json(self) -> dict[str, Json]:
        """As it stands in a manifest."""
        found: dict[str, Json] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if self.urls:
            found["urls"] = list(self.urls)
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.platform is not None:
            found["platform"] = self.platform.to_json()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One image: its configuration and its layers, lowest first.

    Args:
        raw: The bytes that the digest is over.
        media_type: OCI's or Docker's.
        config: The configuration's blob.
        layers: The layers' blobs, lowest first.
    """

    raw: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @classmethod
    def build(
        cls,
        config: Descriptor,
        layers: tuple[Descriptor, ...],
        annotations: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Compose an OCI manifest."""
        document: dict[str, Json] = {
            "schemaVersion": 2,
            "mediaType": MediaType.OCI_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        if annotations:
            document["annotations"] = dict(sorted(annotations.items()))
        raw = jsonio.dump(document)
        return cls(raw=raw, media_type=MediaType.OCI_MANIFEST, config=config, layers=layers)

    @property
    def descriptor(self) -> Descriptor:
        """Its own descriptor."""
        return Descriptor.of(self.raw, self.media_type)

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Everything it refers to, the configuration first."""
        return (self.config, *self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Several manifests, most often one a platform.

    Args:
        raw: The bytes that the digest is over.
        media_type: OCI's or Docker's.
        manifests: What it lists.
    """

    raw: bytes
    media_type: str
    manifests: tuple[Descriptor, ...]

    @classmethod
    def build(cls, manifests: tuple[Descriptor, ...]) -> Index:
        """Compose an OCI index."""
        raw = jsonio.dump(
            {
                "schemaVersion": 2,
                "mediaType": MediaType.OCI_INDEX,
                "manifests": [entry.to_json() for entry in manifests],
            },
        )
        return cls(raw=raw, media_type=MediaType.OCI_INDEX, manifests=manifests)

    @property
    def descriptor(self) -> Descriptor:
        """Its own descriptor."""
        return Descriptor.of(self.raw, self.media_type)

    def choose(self, wanted: Platform) -> Descriptor:
        """The entry that serves `wanted` best; entries with no platform serve any.

        Raises:
            NotFoundError: None does; the message lists those there are.
        """
        best: Descriptor | None = None
        best_score = 0
        for entry in self.manifests:
            score = 1 if entry.platform is None else wanted.score(entry.platform)
            if entry.media_type in MediaType.INDEXES | MediaType.MANIFESTS and score > best_score:
                best, best_score = entry, score
        if best is None:
            offered = sorted({str(e.platform) for e in self.manifests if e.platform is not None})
            msg = f"the image has nothing for {wanted}; it has {', '.join(offered) or 'nothing'}"
            raise NotFoundError(msg, hint=f"choose one: --platform {offered[0]}" if offered else "")
        return best


def parse_document(raw: bytes, media_type: str = "", what: str = "manifest") -> Manifest | Index:
    """Read a manifest or an index of either family.

    Args:
        raw: The document.
        media_type: What the sender says it is; the document's own word must agree with it.
        what: What it is, for messages.

    Raises:
        FormatError: Malformed, or it contradicts itself.
        UnsupportedError: Docker schema 1, or some other kind of document.
    """
    obj = jsonio.load(raw, what)
    if obj.get("schemaVersion") == 1:
        msg = f"{what} is of Docker's schema 1, which was retired in 2022"
        raise UnsupportedError(msg, hint="push the image again with a current tool")
    own = jsonio.text(obj, "mediaType", what, "")
    known = MediaType.INDEXES | MediaType.MANIFESTS
    kind = own or media_type.partition(";")[0].strip()
    if kind not in known:
        kind = MediaType.OCI_INDEX if "manifests" in obj else MediaType.OCI_MANIFEST
    # A document that can be read as both is an attack (CVE-2021-41190).
    if "manifests" in obj and ("layers" in obj or "config" in obj):
        msg = f"{what} has both manifests and layers: it is ambiguous"
        raise FormatError(msg)
    if kind in MediaType.INDEXES:
        entries = [Descriptor.from_json(e, what) for e in jsonio.objects(obj, "manifests", what)]
        return Index(raw=raw, media_type=kind, manifests=tuple(entries))
    if "config" not in obj:
        msg = f"{what} has no config"
        raise FormatError(msg)
    return Manifest(
        raw=raw,
        media_type=kind,
        config=Descriptor.from_json(jsonio.field_map(obj, "config", what), what),
        layers=tuple(Descriptor.from_json(e, what) for e in jsonio.objects(obj, "layers", what)),
    )

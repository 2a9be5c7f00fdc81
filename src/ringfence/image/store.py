"""The image store: blobs, names, unpacked layers, under one directory.

::

    <root>/blobs/sha256/<hex>   manifests, configurations, layers as they came
    <root>/tags/<hash>.json     names
    <root>/layers/<id>/         unpacked layers, as lower directories of an overlay
    <root>/disks/<id>.erofs     whole images as disks
    <root>/partial/             downloads that can go on
    <root>/tmp/                 work in progress
    <root>/lock                 shared by whoever uses the store; alone, the collector of garbage

Everything comes into being beside its place and is renamed into it, so that what is seen is
whole, whenever a process is killed. Everything else is garbage that `prune` collects.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence import _paths
from ringfence.errors import ConfigError, HostError, NotFoundError
from ringfence.image.blobs import BlobStore
from ringfence.image.config import ImageConfig
from ringfence.image.limits import Limits
from ringfence.image.locking import locked
from ringfence.image.manifests import Descriptor, Index, Manifest, parse_document
from ringfence.image.platforms import Platform
from ringfence.image.references import Digest, Reference
from ringfence.image.tags import Tag, TagStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ringfence.image.garbage import Pruned
    from ringfence.image.rootfs import RootTree
    from ringfence.image.transfer import Progress

__all__ = ["Image", "Store"]

MIN_ID_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image in the store, for one platform.

    Args:
        name: The full reference it was found by, or its digest.
        target: What the name stands for: the manifest, or the index that lists it.
        manifest: The manifest.
        config: The configuration.
    """

    name: str
    target: Descriptor
    manifest: Manifest
    config: ImageConfig

    @property
    def id(self) -> Digest:
        """The configuration's digest: the same for equal images, however they are packed."""
        return self.manifest.config.digest

    @property
    def digest(self) -> Digest:
        """The manifest's digest."""
        return self.manifest.descriptor.digest

    @property
    def size(self) -> int:
        """Bytes that it takes in a registry."""
        return sum(blob.size for blob in self.manifest.blobs)


class Store:
    """Images on this host, shared by all machines of one user.

    Safe under concurrent use by any number of processes, and when they are killed at any point.

    Args:
        root: Its directory; made when missing. The default is below the user's data directory.
        limits: What a layer may cost.

    Raises:
        HostError: The directory can't be made.
    """

    def __init__(self, root: Path | None = None, *, limits: Limits | None = None) -> None:
        self.root = root if root is not None else _paths.data_dir() / "images"
        self.limits = limits if limits is not None else Limits()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("blobs/sha256", "tags", "layers", "disks", "partial", "tmp"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"cannot make the image store {self.root}: {error.strerror}"
            hint = "choose another place: RINGFENCE_HOME=/path"
            raise HostError(msg, hint=hint, errno=error.errno, path=str(self.root)) from error
        self.blobs = BlobStore(self.root)
        self.tags = TagStore(self.root)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keep the collector of garbage away for the duration; may be nested."""
        with locked(self.root / "lock", shared=True):
            yield

    def get(self, name: str, *, platform: Platform | None = None) -> Image:
        """Find an image by reference, digest or the first digits of its identity.

        Args:
            name: ``debian:12``, ``sha256:...`` or at least 4 hexadecimal digits.
            platform: For images of several platforms; this host's by default.

        Raises:
            NotFoundError: There is none, or not for that platform.
            ConfigError: `name` is no reference, or digits that fit several images.
        """
        tag = self._find_tag(name)
        if tag is None:
            msg = f"no image {name!r} in the store"
            raise NotFoundError(msg, hint=f"ringfence image pull {name}")
        return self.load(tag.target, tag.name, platform)

    def load(self, target: Descriptor, name: str = "", platform: Platform | None = None) -> Image:
        """Read the image that `target`, a manifest or an index in the store, stands for.

        Raises:
            NotFoundError: A blob is missing, or the index has nothing for the platform.
            FormatError: A document is malformed.
        """
        found = parse_document(self.blobs.read(target.digest), target.media_type, name or "image")
        entry = target
        depth = 0
        while isinstance(found, Index):
            depth += 1
            if depth > 4:
                msg = f"image {name}: indexes nested too deep"
                raise ConfigError(msg)
            entry = found.choose(platform if platform is not None else Platform.host())
            found = parse_document(self.blobs.read(entry.digest), entry.media_type, name)
        config = ImageConfig.parse(self.blobs.read(found.config.digest))
        return Image(name=name or str(target.digest), target=target, manifest=found, config=config)

    def _find_tag(self, name: str) -> Tag | None:
        with contextlib.suppress(ConfigError):
            reference = Reference.parse(name)
            tag = self.tags.get(str(reference))
            if tag is not None:
                return tag
            if reference.digest is not None:
                return self._find_digits(str(reference.digest))
        return self._find_digits(name)

    def _find_digits(self, text: str) -> Tag | None:
        digits = text.removeprefix("sha256:")
        if len(digits) < MIN_ID_DIGITS or not set(digits) <= set("0123456789abcdef"):
            return None
        found: dict[str, Tag] = {}
        for tag in self.tags:
            identities = {tag.target.digest.hex}
            with contextlib.suppress(NotFoundError):
                image = self.load(tag.target, tag.name)
                identities |= {image.id.hex, image.digest.hex}
            if any(identity.startswith(digits) for identity in identities):
                found.setdefault(tag.target.digest.hex, tag)
        if len(found) > 1:
            names = ", ".join(sorted(tag.name for tag in found.values()))
            msg = f"{text!r} fits several images: {names}"
            raise ConfigError(msg, hint="give more digits, or a name")
        return next(iter(found.values()), None)

    def tag(self, source: str, target: str) -> Tag:
        """Give an image a further name.

        Raises:
            NotFoundError: There is no `source`.
            ConfigError: `target` is no reference, or one with a digest.
        """
        reference = Reference.parse(target)
        if reference.digest is not None:
            msg = f"cannot tag {target!r}: a digest can't be chosen"
            raise ConfigError(msg)
        with self.using():
            found = self._find_tag(source)
            if found is None:
                msg = f"no image {source!r} in the store"
                raise NotFoundError(msg, hint=f"ringfence image pull {source}")
            return self.tags.set(str(reference), found.target)

    def add(self, manifest: Manifest | Index, name: str | None) -> Tag:
        """Store a manifest whose blobs are here, under `name` or none; call it in `using`."""
        self.blobs.put(manifest.raw)
        target = manifest.descriptor
        full = str(target.digest) if name is None else str(Reference.parse(name))
        return self.tags.set(full, target)

    def remove(self, name: str) -> str:
        """Forget a name; what nothing names any more goes with the next `prune`.

        Returns:
            The full name that was removed.

        Raises:
            NotFoundError: There is no such image.
        """
        with self.using():
            tag = self._find_tag(name)
            if tag is None or not self.tags.remove(tag.name):
                msg = f"no image {name!r} in the store"
                raise NotFoundError(msg, hint="ringfence image ls")
        return tag.name

    def prune(self, *, every: bool = False, timeout_s: float = 10.0) -> Pruned:
        """Collect what no name leads to.

        Args:
            every: Forget all images that no machine uses, not only those without a name, and
                what builds keep.
            timeout_s: How long to wait for other users of the store to finish.

        Raises:
            StateError: The store was in use all that time.
        """
        from ringfence.image import garbage  # noqa: PLC0415 - only this verb needs it

        return garbage.prune(self, every=every, timeout_s=timeout_s)

    def pull(
        self,
        name: str,
        *,
        platform: Platform | None = None,
        plain_http: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> Image:
        """Bring an image from its registry; what is here already isn't fetched again.

        Args:
            name: Its reference.
            platform: For images of several platforms; this host's by default.
            plain_http: Speak unencrypted HTTP to the registry.
            progress: Is told of each blob's bytes, from any thread.

        Raises:
            NotFoundError: The registry has no such image.
            ConfigError: The registry refused the credentials, or `name` is no reference.
            HostError: The network is at fault.
            FormatError: What arrived isn't what was promised.
        """
        from ringfence.image import pull  # noqa: PLC0415 - the HTTP client is slow to import

        return pull.pull(self, name, platform=platform, plain_http=plain_http, progress=progress)

    def push(
        self,
        name: str,
        destination: str | None = None,
        *,
        plain_http: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> Digest:
        """Send an image to a registry.

        Args:
            name: The image, in this store.
            destination: Its reference there; `name` by default.
            plain_http: Speak unencrypted HTTP to the registry.
            progress: Is told of each blob's bytes, from any thread.

        Returns:
            The digest it has there.

        Raises:
            NotFoundError: There is no such image here.
            ConfigError: The registry refused the credentials.
            HostError: The network is at fault.
        """
        from ringfence.image import push  # noqa: PLC0415 - the HTTP client is slow to import

        return push.push(self, name, destination, plain_http=plain_http, progress=progress)

    def rootfs(self, image: Image, *, mapped: bool = False) -> RootTree:
        """The image's layers, unpacked, held against `prune` until the result is closed.

        Args:
            image: Which image.
            mapped: For a user namespace whose user 0 is this user and whose others are this user's
                subordinate ones: give files the image's owners in it. Where the host has given no
                such, and for root, it changes nothing.

        Raises:
            FormatError: A layer isn't what its digest says, or is hostile.
            HostError: The disk is full.
        """
        from ringfence.image import rootfs  # noqa: PLC0415 - decompressors are slow to import

        return rootfs.rootfs(self, image, mapped=mapped)

    def disk(self, image: Image) -> Path:
        """The image as a read-only EROFS disk: opened, it stays whatever `prune` does.

        Raises:
            FormatError: A layer isn't what its digest says, or is hostile.
            HostError: The disk is full.
        """
        from ringfence.image import rootfs  # noqa: PLC0415 - decompressors are slow to import

        return rootfs.disk(self, image)

"""Names of images: ``[registry[:port]/]repository[:tag][@digest]``, and digests.

A short name means what it means to Docker: ``debian`` is ``docker.io/library/debian:latest``.

Source: the grammar of the OCI distribution specification 1.1 (names, tags) and image
specification 1.1 (digests).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

from ringfence.errors import ConfigError, FormatError

__all__ = ["DEFAULT_REGISTRY", "Digest", "Reference"]

DEFAULT_REGISTRY = "docker.io"

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?",
)
_HEX_LENGTH = {"sha256": 64, "sha384": 96, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+")
MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The hash that names a blob.

    Args:
        algorithm: ``sha256``, ``sha384`` or ``sha512``.
        hex: The hash in lower-case hexadecimal.
    """

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``algorithm:hex``.

        Raises:
            FormatError: An unknown algorithm, or not as many hexadecimal digits as it has.
        """
        algorithm, _, value = text.partition(":")
        if _HEX_LENGTH.get(algorithm) != len(value) or not _HEX.fullmatch(value):
            msg = f"not a digest: {text[:200]!r} (expected sha256:<64 hexadecimal digits>)"
            raise FormatError(msg)
        return cls(algorithm, value)

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """The digest of `data`."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    @property
    def short(self) -> str:
        """The first 12 digits, as lists show them."""
        return self.hex[:12]

    def __str__(self) -> str:
        """``algorithm:hex``."""
        return f"{self.algorithm}:{self.hex}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where an image is and which one it is.

    Args:
        registry: Host, with its port when it isn't 443.
        repository: Path below it, lower case.
        tag: The name that can move, if given.
        digest: The manifest's digest, if given; it wins over the tag.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as users write it; ``latest`` where neither tag nor digest is given.

        >>> str(Reference.parse("debian:12"))
        'docker.io/library/debian:12'

        Raises:
            ConfigError: It isn't one; the message says which part.
        """
        name, at, digest_text = text.partition("@")
        digest: Digest | None = None
        if at:
            try:
                digest = Digest.parse(digest_text)
            except FormatError as error:
                msg = f"image reference {text!r}: {error.message}"
                raise ConfigError(msg) from error
        registry, rest = _split_registry(name)
        repository, colon, tag_text = rest.partition(":")
        if colon and not _TAG.fullmatch(tag_text):
            msg = f"image reference {text!r}: {tag_text!r} is not a tag"
            raise ConfigError(msg, hint="letters, digits, '_', '.', '-'; at most 128 of them")
        if registry == DEFAULT_REGISTRY and "/" not in repository:
            repository = f"library/{repository}"
        cls._check(text, registry, repository)
        tag = tag_text if colon else None
        if tag is None and digest is None:
            tag = "latest"
        return cls(registry=registry, repository=repository, tag=tag, digest=digest)

    @staticmethod
    def _check(text: str, registry: str, repository: str) -> None:
        if not _HOST.fullmatch(registry):
            msg = f"image reference {text!r}: {registry!r} is not a host name"
            raise ConfigError(msg)
        if not _REPOSITORY.fullmatch(repository):
            msg = f"image reference {text!r}: {repository!r} is not a repository name"
            raise ConfigError(
                msg,
                hint="lower-case letters and digits, separated by '/', '.', '_' or '-'",
            )
        if len(registry) + len(repository) > MAX_NAME_BYTES:
            msg = f"image reference {text[:60]!r}...: longer than {MAX_NAME_BYTES} characters"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """Registry and repository, with neither tag nor digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def familiar(self) -> str:
        """The shortest form that means the same: what lists show."""
        short = str(self)
        for prefix in (f"{DEFAULT_REGISTRY}/library/", f"{DEFAULT_REGISTRY}/"):
            if short.startswith(prefix):
                return short.removeprefix(prefix)
        return short

    @property
    def selector(self) -> str:
        """What a registry is asked for: the digest if there is one, else the tag."""
        return str(self.digest) if self.digest is not None else self.tag or "latest"

    def with_digest(self, digest: Digest) -> Reference:
        """The same repository at that digest, without the tag."""
        return replace(self, tag=None, digest=digest)

    def __str__(self) -> str:
        """The full form."""
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.name}{tag}{digest}"


def _split_registry(name: str) -> tuple[str, str]:
    """The registry's host and the rest; a first component is a host if it looks like one."""
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host = DEFAULT_REGISTRY if first in ("index.docker.io", "registry-1.docker.io") else first
        return host, rest
    return DEFAULT_REGISTRY, name

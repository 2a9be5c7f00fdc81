"""Platforms of images: ``os/architecture[/variant]``.

Source: OCI image specification 1.1, image-index.md; the names are Go's.
"""

from __future__ import annotations

import platform as host_platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError
from ringfence.image import jsonio

if TYPE_CHECKING:
    from ringfence.image.jsonio import Json, JsonObject

__all__ = ["Platform"]

_MACHINES = {
    "x86_64": ("amd64", ""), "amd64": ("amd64", ""), "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""), "arm64": ("arm64", ""),
    "armv7l": ("arm", "v7"), "armhf": ("arm", "v7"), "armv6l": ("arm", "v6"), "armel": ("arm", "v6"),
    "i386": ("386", ""), "i686": ("386", ""),
}  # fmt: skip
_DEFAULT_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What an image's programs run on.

    Args:
        os: ``linux``.
        architecture: Go's name: ``amd64``, ``arm64``, ``riscv64``.
        variant: ``v7``; empty where there is none.
    """

    os: str = "linux"
    architecture: str
    variant: str = ""

    @classmethod
    def host(cls) -> Platform:
        """This host's."""
        return cls.parse(f"linux/{host_platform.machine()}")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read ``linux/amd64``, ``linux/arm/v7`` or an architecture alone.

        Raises:
            ConfigError: More than three parts or an empty one.
        """
        parts = text.lower().split("/")
        if len(parts) == 1:
            parts.insert(0, "linux")
        if len(parts) > 3 or not all(parts):
            msg = f"not a platform: {text!r}"
            raise ConfigError(msg, hint="linux/amd64, linux/arm64 or linux/arm/v7")
        architecture, variant = _MACHINES.get(parts[1], (parts[1], ""))
        if len(parts) == 3:
            variant = parts[2]
        return cls(os=parts[0], architecture=architecture, variant=variant)

    @classmethod
    def from_json(cls, obj: JsonObject, what: str) -> Platform:
        """From a descriptor's ``platform`` or an image configuration."""
        return cls(
            os=jsonio.text(obj, "os", what, ""),
            architecture=jsonio.text(obj, "architecture", what, ""),
            variant=jsonio.text(obj, "variant", what, ""),
        )

    def to_json(self) -> dict[str, Json]:
        """As a descriptor's ``platform``."""
        found: dict[str, Json] = {"architecture": self.architecture, "os": self.os}
        if self.variant:
            found["variant"] = self.variant
        return found

    def score(self, offered: Platform) -> int:
        """How well `offered` serves this one: 0 not at all, more is better."""
        if (self.os, self.architecture) != (offered.os, offered.architecture):
            return 0
        usual = _DEFAULT_VARIANTS.get(self.architecture, "")
        want, have = self.variant or usual, offered.variant or usual
        if want == have:
            return 100
        # An older variant of the same architecture runs; a newer one doesn't.
        if have < want and want[:1] == have[:1] == "v":
            return 50 + _number(have)
        return 0

    def __str__(self) -> str:
        """``os/architecture[/variant]``."""
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def _number(variant: str) -> int:
    digits = variant.lstrip("v")
    return int(digits) if digits.isdigit() and len(digits) < 3 else 0

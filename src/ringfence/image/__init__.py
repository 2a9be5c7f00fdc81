"""Images: OCI and Docker images in a store of their own, to and from registries and archives.

>>> from ringfence.image import Reference
>>> Reference.parse("debian:12").registry
'docker.io'
"""

from __future__ import annotations

from ringfence.image.config import ImageConfig
from ringfence.image.limits import Limits
from ringfence.image.platforms import Platform
from ringfence.image.references import Digest, Reference
from ringfence.image.rootfs import RootTree
from ringfence.image.store import Image, Store

__all__ = [
    "Digest",
    "Image",
    "ImageConfig",
    "Limits",
    "Platform",
    "Reference",
    "RootTree",
    "Store",
]

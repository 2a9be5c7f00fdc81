"""A Debian image from debootstrap, made once and kept in ``.cache``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.image.archives import import_images
from ringfence.image.create import from_debootstrap
from ringfence.image.export import export_images

if TYPE_CHECKING:
    from ringfence.image import Store

__all__ = ["debian_image"]

_CACHED = Path(__file__).resolve().parents[2] / ".cache" / "images" / "bookworm.tar"


def debian_image(store: Store, name: str = "debian:12") -> str:
    """Puts it into a store; skips where it can't be made."""
    if not _CACHED.exists():
        if shutil.which("debootstrap") is None or os.geteuid() != 0:
            pytest.skip("the Debian image is not cached, and making it needs root and debootstrap")
        _CACHED.parent.mkdir(parents=True, exist_ok=True)
        work = _CACHED.with_suffix(".part")
        work.unlink(missing_ok=True)
        from_debootstrap(store, "bookworm", name)
        export_images(store, [name], work)
        work.rename(_CACHED)
    import_images(store, _CACHED, name)
    return name

"""Bounds on what an image may cost: a hostile one is refused before it fills the disk."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one layer may come to.

    Args:
        layer_bytes: Length of the uncompressed tar, and of all files' apparent sizes together.
        entries: Number of files, directories and links.
        ratio: Uncompressed to compressed bytes, counted past `ratio_from_bytes`. Honest layers
            stay below 100; gzip can reach 1,000, zstd 30,000.
        ratio_from_bytes: Below this many uncompressed bytes any ratio is fine.
        header_bytes: One extended header (names, attributes).
        depth: Components of a path.
    """

    layer_bytes: int = 64 * _GIB
    entries: int = 4_000_000
    ratio: int = 400
    ratio_from_bytes: int = 256 * _MIB
    header_bytes: int = _MIB
    depth: int = 512

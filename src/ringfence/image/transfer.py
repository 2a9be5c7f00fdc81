"""How far a transfer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringfence.image.references import Digest

__all__ = ["Progress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One blob's state.

    Args:
        digest: Which blob.
        done: Bytes so far.
        total: Its length in bytes.
        note: A word where nothing is sent or fetched: ``exists``, ``mounted``.
    """

    digest: Digest
    done: int
    total: int
    note: str = ""

"""Names for machines that were given none, and their IDs."""

from __future__ import annotations

import os

__all__ = ["new_id", "new_name"]

_QUALITIES = (
    "able", "amber", "ample", "apt", "azure", "bold", "brave", "brisk", "broad", "calm", "civil",
    "clear", "clever", "coral", "cosy", "crisp", "daring", "deep", "eager", "early", "exact",
    "fair", "fleet", "fond", "frank", "fresh", "gentle", "glad", "golden", "grand", "green",
    "hale", "handy", "happy", "hardy", "honest", "ideal", "jolly", "just", "keen", "kind", "late",
    "lively", "loyal", "lucid", "lucky", "mellow", "merry", "mild", "modest", "neat", "nimble",
    "noble", "olive", "patient", "plain", "proud", "quick", "quiet", "rapid", "ready", "royal",
    "sage", "sharp", "silent", "simple", "sleek", "smart", "solid", "spry", "steady", "still",
    "sunny", "swift", "tidy", "tranquil", "true", "vivid", "warm", "wise", "witty", "young",
)  # fmt: skip
_BIRDS = (
    "auk", "avocet", "bittern", "brant", "bunting", "chough", "condor", "coot", "crane", "crow",
    "curlew", "dipper", "dove", "duck", "dunlin", "eagle", "egret", "eider", "falcon", "finch",
    "fulmar", "gannet", "godwit", "goose", "goshawk", "grebe", "grouse", "gull", "harrier",
    "hawk", "heron", "hobby", "hoopoe", "ibis", "jackdaw", "jay", "kestrel", "kite", "knot",
    "lapwing", "lark", "linnet", "loon", "magpie", "martin", "merlin", "moorhen", "nuthatch",
    "oriole", "osprey", "ouzel", "owl", "petrel", "pipit", "plover", "puffin", "quail", "rail",
    "raven", "redstart", "robin", "rook", "ruff", "shrike", "siskin", "skua", "snipe", "sparrow",
    "starling", "stork", "swallow", "swan", "swift", "teal", "tern", "thrush", "tit", "wagtail",
    "warbler", "whinchat", "wren",
)  # fmt: skip


def new_id() -> str:
    """Twelve hexadecimal digits that no other machine has."""
    return os.urandom(6).hex()


def new_name() -> str:
    """A name that is easy to say and to type."""
    quality, bird = os.urandom(4), os.urandom(4)
    return f"{_one_of(_QUALITIES, quality)}-{_one_of(_BIRDS, bird)}"


def _one_of(words: tuple[str, ...], drawn: bytes) -> str:
    return words[int.from_bytes(drawn, "little") % len(words)]

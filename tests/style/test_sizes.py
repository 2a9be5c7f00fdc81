"""Small files, with a short list of those that aren't yet."""

from __future__ import annotations

from tests.style.repository import text, with_suffix

LIMITS = {".rs": 600, ".py": 400, ".pyi": 400}

# Files that are too long: how long they may be until they are split. This list only shrinks.
KNOWN = {
    "crates/engine-bt/src/step/flow.rs": 720,
    "crates/engine-bt/src/translate/memory.rs": 640,
    "crates/engine-bt/src/translate/plan.rs": 660,
    "crates/engine-bt/src/window.rs": 690,
}


def lengths() -> dict[str, int]:
    """How many lines each source file has, when that is over its limit."""
    found = {str(path): (path.suffix, text(path).count("\n")) for path in with_suffix(*LIMITS)}
    return {path: lines for path, (suffix, lines) in found.items() if lines > LIMITS[suffix]}


def test_files_are_small() -> None:
    too_long = {path: lines for path, lines in lengths().items() if lines > KNOWN.get(path, 0)}
    assert too_long == {}, "split these"


def test_the_list_of_long_files_is_true() -> None:
    assert sorted(set(KNOWN) - set(lengths())) == [], "take these off the list"

"""Words that don't belong: in names, since they say nothing, and in files, since they speak of something else."""

from __future__ import annotations

import re

from tests.style.repository import files, text

EMPTY_NAMES = {"util", "utils", "common", "base", "helper", "helpers", "manager", "misc"}

FOREIGN = {
    "left-over work": r"\b(?:TODO|FIXME|XXX|HACK)\b",
    "marketing": r"(?i)\b(?:blazing(?:ly)?|seamless(?:ly)?|cutting[- ]edge|world[- ]class)\b",
    "a conflict": r"^(?:<{7} |>{7} )",
}
# Where an empty name is the standard's own word: the common configuration of virtio 1.2 §4.1.4.3.
STANDARD_NAMES = {"crates/virtio/src/pci/common.rs"}
EXEMPT = {"LICENSE", "Cargo.lock"}


def test_names_say_something() -> None:
    wrong = []
    for path in files():
        words = {part.split(".")[0].lower() for part in path.parts}
        if words & EMPTY_NAMES and str(path) not in STANDARD_NAMES:
            wrong.append(str(path))
    assert wrong == []


def test_files_speak_of_the_project_alone() -> None:
    wrong = []
    for path in files():
        if path.name in EXEMPT or path.parts[:2] == ("tests", "style"):
            continue
        lines = text(path).splitlines()
        for what, pattern in FOREIGN.items():
            matcher = re.compile(pattern)
            wrong += [
                f"{path}:{number}: {what}: {line.strip()}"
                for number, line in enumerate(lines, 1)
                if matcher.search(line)
            ]
    assert wrong == []

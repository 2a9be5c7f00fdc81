"""Writes docs/README.md: a list of all documents, by their titles. ``--check`` only says whether it is current."""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"

HEAD = """\
# Documentation

Start with the [README](../README.md); how it is built is in [ARCHITECTURE](../ARCHITECTURE.md), what it promises in
[SPECIFICATION](../SPECIFICATION.md). This list is written by `make format`.
"""
SECTIONS = {
    "Tutorials": "tutorial",
    "How to": "howto",
    "Reference": "reference",
    "Design": "design",
    "Decision records": "adr",
}


def title(path: Path) -> str:
    """A document's first heading, without the number of a record."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return re.sub(r"^(?:ADR )?\d+[.:]? ", "", first.lstrip("# ").strip())


def index() -> str:
    """The whole list."""
    parts = [HEAD]
    for heading, folder in SECTIONS.items():
        paths = sorted((DOCS / folder).glob("*.md"))
        if not paths:
            continue
        parts.append(f"\n## {heading}\n\n")
        for path in paths:
            number = f"{path.name[:4]} " if folder == "adr" else ""
            parts.append(f"- {number}[{title(path)}]({folder}/{path.name})\n")
    return "".join(parts)


def main() -> int:
    """Writes or checks."""
    path = DOCS / "README.md"
    if "--check" in sys.argv[1:]:
        return int(path.read_text(encoding="utf-8") != index())
    path.write_text(index(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Decision records, links, licences, and what each crate says about its unsafe code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.style.repository import REPOSITORY, files, text, with_suffix

RECORD = re.compile(r"docs/adr/(\d{4})-[a-z0-9-]+\.md")
SECTIONS = ("## Context", "## Decision", "## Consequences")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
ROOT_DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "SPECIFICATION.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
)
# Crates whose unsafe code is yet to be accounted for. This list only shrinks.
PENDING = {"crates/engine-bt"}


def records() -> list[Path]:
    """The decision records."""
    return [
        path
        for path in with_suffix(".md")
        if path.parts[:2] == ("docs", "adr") and path.stem != "README"
    ]


def test_decision_records_have_their_form() -> None:
    wrong = []
    for path in records():
        lines = text(path).splitlines()
        if not RECORD.fullmatch(str(path)):
            wrong.append(f"{path}: not NNNN-title.md")
        if not lines or not lines[0].startswith("# "):
            wrong.append(f"{path}: no title")
        found = [line for line in lines if line.startswith("## ") and line in SECTIONS]
        if found != list(SECTIONS):
            wrong.append(f"{path}: sections {found}")
    assert wrong == []


def test_decision_records_have_numbers_of_their_own() -> None:
    numbers = [path.name[:4] for path in records()]
    assert len(numbers) == len(set(numbers)), numbers


def test_links_lead_somewhere() -> None:
    wrong = []
    for path in with_suffix(".md"):
        for target in LINK.findall(text(path)):
            place = target.split("#")[0]
            if not place or "://" in place or place.startswith("mailto:"):
                continue
            if not (REPOSITORY / path.parent / place).exists():
                wrong.append(f"{path}: {target}")
    assert wrong == []


def test_the_root_has_its_documents() -> None:
    present = {str(path) for path in files()}
    assert [name for name in ROOT_DOCUMENTS if name not in present] == []


def test_everything_is_under_the_licence() -> None:
    assert "Apache License" in text(Path("LICENSE"))
    project = tomllib.loads(text(Path("pyproject.toml")))["project"]
    assert project["license"] == "Apache-2.0"
    for path in files():
        if path.name != "Cargo.toml" or path.parts[0] not in {"crates", "fuzz"}:
            continue
        licence = tomllib.loads(text(path))["package"].get("license")
        assert licence in ({"workspace": True}, "Apache-2.0"), path


def test_crates_say_what_they_model() -> None:
    silent = [
        str(path)
        for path in with_suffix(".rs")
        if path.name in {"lib.rs", "main.rs"}
        and path.parts[0] == "crates"
        and not text(path).startswith("//!")
    ]
    assert silent == []


def test_unsafe_code_is_forbidden_or_accounted_for() -> None:
    wrong = []
    for path in files():
        if path.name != "lib.rs" or path.parts[0] != "crates" or len(path.parts) != 4:
            continue
        crate = path.parent.parent
        if "#![forbid(unsafe_code)]" in text(path):
            continue
        if not (REPOSITORY / crate / "SAFETY.md").exists() and str(crate) not in PENDING:
            wrong.append(f"{crate}: neither forbids unsafe code nor has a SAFETY.md")
    assert wrong == []

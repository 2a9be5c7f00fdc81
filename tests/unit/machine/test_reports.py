"""Reports of bugs are few, and nobody else's to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.machine import reports

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_latest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path))
    paths = [reports.save("m", "it fell", f"state {number}") for number in range(25)]
    kept = sorted(path for path in paths if path is not None and path.exists())
    assert kept == sorted(path for path in paths[-20:] if path is not None)
    assert kept[-1].read_text().startswith("it fell\nringfence ")


def test_without_a_place_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path))
    (tmp_path / "state").write_text("in the way")
    assert reports.save("m", "it fell", "state") is None

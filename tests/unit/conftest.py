"""Every unit test has a home of its own for what Ringfence keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ringfence.machine import engines
from tests.framework.fake_driver import FakeDriver

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory below which all is kept."""
    path = tmp_path / "home"
    monkeypatch.setenv("RINGFENCE_HOME", str(path))
    return path


@pytest.fixture
def driver(home: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:  # noqa: ARG001 - records
    """The driver that all machines of the test get."""
    fake = FakeDriver()
    monkeypatch.setattr(engines, "load_driver", lambda _engine: fake)
    return fake

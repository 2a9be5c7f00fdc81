"""The probe of /dev/kvm: measured once, and what the choice of engine makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ringfence.errors import UnsupportedError
from ringfence.host import probe
from ringfence.host.probe import KvmState, Verdict
from ringfence.machine import engines

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("home")


def pretend(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[int]:
    """Lets the measurement find this; the list grows with each."""
    measured: list[int] = []

    def measure() -> KvmState:
        measured.append(1)
        return KvmState(verdict=verdict, summary=f"it is {verdict}", remedy="mend it", mips=1.0)

    monkeypatch.setattr(probe, "_measure", measure)
    return measured


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch, "emulating")
    first = probe.kvm()
    assert probe.kvm() == first
    assert len(measured) == 1
    probe.kvm(fresh=True)
    assert len(measured) == 2


def test_another_boot_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = pretend(monkeypatch, "usable")
    boot = tmp_path / "boot"
    monkeypatch.setattr(probe, "_BOOT_ID", boot)
    for text in ("first", "second", "second"):
        boot.write_text(text)
        probe.kvm()
    assert len(measured) == 2


def test_a_spoilt_memory_is_measured_again(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    measured = pretend(monkeypatch, "usable")
    probe.kvm()
    (home / "cache/kvm-probe.json").write_text("{")
    probe.kvm()
    assert len(measured) == 2


@pytest.mark.parametrize("verdict", ["missing", "not_permitted", "broken", "emulating"])
def test_auto_takes_bt_and_says_why(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> None:
    pretend(monkeypatch, verdict)
    choice = engines.choose("auto")
    assert choice.engine == "bt"
    assert f"it is {verdict}" in choice.reason


def test_auto_takes_kvm_where_it_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "usable")
    assert engines.choose("auto").engine == "kvm"


def test_asking_for_kvm_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "not_permitted")
    with pytest.raises(UnsupportedError, match="it is not_permitted") as error:
        engines.choose("kvm")
    assert error.value.hint == "mend it"

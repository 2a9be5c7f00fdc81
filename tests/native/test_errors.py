"""Each native failure arrives as the class that says whose fault it is."""

from __future__ import annotations

import re

import pytest

from ringfence import errors
from ringfence._native import host as native_host
from ringfence._native import lowlevel as native
from ringfence.lowlevel import engines


def test_an_unknown_engine_is_the_callers_fault_and_the_known_are_named() -> None:
    with pytest.raises(errors.ConfigError, match=r'no engine "qemu".*kvm'):
        native.Machine("qemu", 1 << 20, 1, exit_on_unclaimed=True)


def test_the_engines_are_listed() -> None:
    assert "kvm" in engines()


def test_the_probe_says_what_it_found_and_what_to_do() -> None:
    probe = native_host.probe_kvm()
    assert probe.verdict in {"missing", "not_permitted", "broken", "emulating", "usable"}
    assert "/dev/kvm" in probe.summary
    assert bool(probe.remedy) == (probe.verdict != "usable")
    assert probe.took_s < 2.0
    if probe.verdict in {"emulating", "usable"}:
        assert probe.mips is not None
        assert re.search(r"\d", probe.summary)
    else:
        assert probe.mips is None

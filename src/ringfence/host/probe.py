"""Measured abilities of the host, remembered until it boots again.

A ``/dev/kvm`` that exists says little: it may be closed to this user, and there are KVM modules
that run a guest's kernel through an instruction emulator. So a loop is timed in a throw-away guest,
once a boot of the host and a state of the device file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from ringfence import _paths

__all__ = ["KvmState", "Verdict", "kvm"]

Verdict = Literal["missing", "not_permitted", "broken", "emulating", "usable"]

_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmState:
    """What the probe of ``/dev/kvm`` found.

    Args:
        verdict: In a word.
        summary: In a sentence.
        remedy: What to do about it; empty when it is usable.
        mips: Guest speed in million instructions a second, when a guest ran.
    """

    verdict: Verdict
    summary: str
    remedy: str = ""
    mips: float | None = None


def kvm(*, fresh: bool = False) -> KvmState:
    """What ``/dev/kvm`` is good for.

    Args:
        fresh: Measure again, whatever is remembered.
    """
    key = _key()
    path = _paths.cache_dir() / "kvm-probe.json"
    if not fresh and (known := _remembered(path, key)) is not None:
        return known
    found = _measure()
    # What goes away by itself isn't remembered; neither is what costs nothing to find out.
    if found.verdict in ("emulating", "usable"):
        _remember(path, key, found)
    return found


def _key() -> str:
    try:
        status = _DEVICE.stat()
        device = f"{status.st_rdev}:{status.st_mode}:{status.st_ctime_ns}"
    except OSError:
        device = "missing"
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        boot = ""
    return f"{boot}:{os.geteuid()}:{device}"


def _remembered(path: Path, key: str) -> KvmState | None:
    try:
        written = json.loads(path.read_text())
        if written.pop("key") != key:
            return None
        return KvmState(**written)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _remember(path: Path, key: str, found: KvmState) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    # A cache that can't be written only costs time.
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"key": key, **dataclasses.asdict(found)}))
        fresh.rename(path)


def _measure() -> KvmState:
    try:
        from ringfence._native import host  # noqa: PLC0415 - needed once a boot
    except ImportError as error:
        message = f"/dev/kvm can't be measured: the compiled module is missing ({error})"
        return KvmState(verdict="broken", summary=message, remedy="make build")
    found = host.probe_kvm()
    return KvmState(
        verdict=cast("Verdict", found.verdict),
        summary=found.summary,
        remedy=found.remedy,
        mips=found.mips,
    )

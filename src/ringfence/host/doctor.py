"""What each engine can do on this host, why not, and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ringfence import _binaries
from ringfence.errors import NotFoundError
from ringfence.host import probe

__all__ = ["Finding", "Level", "examine"]

Level = Literal["ok", "slow", "no"]

# What a translated guest can't do without: its code is copied to this processor.
_NEEDED_FLAGS = ("cx16", "fxsr", "sse2", "syscall")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: What: ``engine kvm``, ``kernel``, ...
        level: ``ok``, ``slow`` or ``no``.
        summary: What was found, in a sentence.
        remedy: What to do about it; empty when nothing need be done.
    """

    subject: str
    level: Level
    summary: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Looks at all of it; the engines first, best first."""
    return [_kvm(), _bt(), _container(), _programs()]


def _kvm() -> Finding:
    found = probe.kvm(fresh=True)
    level: Level = {"usable": "ok", "emulating": "slow"}.get(found.verdict, "no")  # type: ignore[assignment]
    return Finding(subject="engine kvm", level=level, summary=found.summary, remedy=found.remedy)


def _bt() -> Finding:
    machine = platform.machine()
    if machine != "x86_64":
        summary = f"it translates x86-64 code for an x86-64 processor; this is {machine}"
        return Finding(subject="engine bt", level="no", summary=summary)
    missing = [flag for flag in _NEEDED_FLAGS if flag not in _cpu_flags()]
    if missing:
        summary = f"this processor lacks {', '.join(missing)}"
        return Finding(subject="engine bt", level="no", summary=summary)
    summary = "it needs no /dev/kvm and no root: guests run by binary translation"
    return Finding(subject="engine bt", level="ok", summary=summary)


def _cpu_flags() -> set[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def _container() -> Finding:
    subject = "engine container"
    if not _has_module("ringfence.container.driver"):
        return Finding(subject=subject, level="no", summary="this installation doesn't have it")
    if os.geteuid() == 0:
        summary = "namespaces and cgroups of this host; the kernel is shared with it"
        return Finding(subject=subject, level="ok", summary=summary)
    refusal = _user_namespaces_refused()
    if refusal:
        remedy = "sudo sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
        return Finding(subject=subject, level="no", summary=refusal, remedy=remedy)
    summary = "user namespaces; the kernel is shared with the host"
    return Finding(subject=subject, level="ok", summary=summary)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _user_namespaces_refused() -> str:
    for name in ("kernel/unprivileged_userns_clone", "user/max_user_namespaces"):
        with suppress(OSError):
            if (Path("/proc/sys") / name).read_text().strip() == "0":
                return f"user namespaces are switched off by {name.replace('/', '.')}"
    return ""


def _programs() -> Finding:
    try:
        vm, agent = _binaries.find("ringfence-vm"), _binaries.find("ringfence-agent")
    except NotFoundError as error:
        return Finding(subject="programs", level="no", summary=error.message, remedy=error.hint)
    return Finding(subject="programs", level="ok", summary=f"{vm}, {agent}")

"""``ringfence doctor``: what this host can run, why not, and how to mend it."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.errors import RingfenceError
from ringfence.guest import kernels
from ringfence.host import doctor
from ringfence.machine import engines

if TYPE_CHECKING:
    import argparse

_MARKS = {"ok": ("✓", 32), "slow": ("!", 33), "no": ("✗", 31)}
_WORDS = {"ok": "usable", "slow": "slow", "no": "not usable"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    output.add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    with output.Spinner("looking at this host"):
        findings = [*doctor.examine(), _kernel()]
        choice = engines.choose("auto")
    if args.format == "json":
        output.print_json(
            {
                "auto": dataclasses.asdict(choice),
                "findings": [dataclasses.asdict(finding) for finding in findings],
            }
        )
        return 0
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        words = f"{_WORDS[finding.level]}: " if finding.subject.startswith("engine") else ""
        print(f"{_mark(finding.level)} {finding.subject:<{width}}  {words}{finding.summary}")
        if finding.remedy:
            print(f"  {'':<{width}}  to mend it: {finding.remedy}")
    print(f"\n--engine auto takes {choice.engine} here: {choice.reason}")
    return 0


def _kernel() -> doctor.Finding:
    subject = "kernel"
    try:
        found = kernels.list_kernels()
    except RingfenceError as error:
        return doctor.Finding(subject=subject, level="no", summary=error.message, remedy=error.hint)
    if not found:
        summary = "there is none yet; the first run fetches the distribution's"
        remedy = "ringfence kernel fetch"
        return doctor.Finding(subject=subject, level="slow", summary=summary, remedy=remedy)
    first = found[0]
    return doctor.Finding(subject=subject, level="ok", summary=f"{first.version} ({first.source})")


def _mark(level: str) -> str:
    mark, colour = _MARKS[level]
    return f"\033[{colour}m{mark}\033[0m" if sys.stdout.isatty() else mark

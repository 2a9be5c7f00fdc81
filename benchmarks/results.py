"""What a run measured: kept as JSON, shown as tables, compared with another run."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    # Gets a line for each step.
    Log = Callable[[str], object]

REPOSITORY = Path(__file__).resolve().parents[1]

Json = dict[str, object]


@dataclass(slots=True, kw_only=True)
class Series:
    """What was measured of one thing on one system, in the order of measuring.

    Args:
        unit: ``s``, ``MiB``, ``MB/s`` or ``x``.
        values: Nothing is left out.
    """

    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The value in the middle; nan when there are none."""
        return statistics.median(self.values) if self.values else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: a figure, what it should be, and whether it is.

    Args:
        name: Of the work.
        cells: Text for each column of the table.
        reached: None where there is no target.
    """

    name: str
    cells: tuple[str, ...]
    reached: bool | None = None


@dataclass(slots=True, kw_only=True)
class Suite:
    """The results of a suite.

    Args:
        name: As the command line has it.
        columns: Of its table, after the name.
        series: By ``work/system``.
        rows: The table.
        notes: What has to be known to read it.
    """

    name: str
    columns: tuple[str, ...] = ()
    series: dict[str, Series] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, work: str, system: str, value: float, unit: str = "s") -> None:
        """Notes a measurement."""
        self.series.setdefault(f"{work}/{system}", Series(unit=unit)).values.append(value)

    def median(self, work: str, system: str) -> float:
        """The median of what was measured; nan when nothing was."""
        series = self.series.get(f"{work}/{system}")
        return series.median if series else math.nan

    def ratio(self, work: str, system: str, peer: str) -> float:
        """How many times as long ``system`` takes as ``peer``."""
        base = self.median(work, peer)
        return self.median(work, system) / base if base else math.nan

    def table(self) -> str:
        """The rows as a Markdown table."""
        lines = [("", *self.columns, "reached")]
        marks = {None: "", True: "yes", False: "no"}
        lines += [(row.name, *row.cells, marks[row.reached]) for row in self.rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
        drawn = [
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |"
            for line in lines
        ]
        drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([f"## {self.name}", "", *drawn, *(f"\n{note}" for note in self.notes)])


def geometric_mean(values: list[float]) -> float:
    """The geometric mean; nan when a value is missing."""
    if not values or any(math.isnan(value) or value <= 0 for value in values):
        return math.nan
    return math.exp(statistics.fmean(math.log(value) for value in values))


def seconds(value: float) -> str:
    """A time as tables show it."""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def host() -> Json:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "processor": model,
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(path: Path, suites: list[Suite]) -> None:
    """Keeps a run."""
    document = {
        "host": host(),
        "suites": {
            suite.name: {
                name: {"unit": series.unit, "median": series.median, "values": series.values}
                for name, series in sorted(suite.series.items())
            }
            for suite in suites
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def compare(before: Path, after: Path) -> str:
    """The medians of two runs beside each other, and their ratio.

    The rows are those that both have.
    """
    old, new = (_medians(path) for path in (before, after))
    lines = [f"{'':44} {'before':>12} {'after':>12} {'ratio':>7}"]
    for name in sorted(old.keys() & new.keys()):
        ratio = new[name] / old[name] if old[name] else math.nan
        lines.append(f"{name:44} {old[name]:12.6g} {new[name]:12.6g} {ratio:7.3f}")
    return "\n".join(lines)


def _medians(path: Path) -> dict[str, float]:
    document = json.loads(path.read_text())
    return {
        f"{suite}:{name}": float(series["median"])
        for suite, all_series in document["suites"].items()
        for name, series in all_series.items()
    }

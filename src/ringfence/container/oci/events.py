"""events: statistics and out-of-memory kills, a JSON document a line."""

from __future__ import annotations

import sys
import time

from ringfence.container import lean_json
from ringfence.container.cgroups import stats
from ringfence.container.cgroups.group import Group
from ringfence.container.oci.options import parse
from ringfence.container.state import State
from ringfence.errors import ConfigError, StateError

__all__ = ["events_command"]

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
# Kills are looked for this often, in seconds.
_LOOK_S = 0.25


def _seconds(text: str) -> float:
    for unit, factor in _UNITS.items():
        digits = text.removesuffix(unit)
        if digits != text and digits.replace(".", "", 1).isdigit():
            return float(digits) * factor
    message = f"--interval takes a time such as 5s, not {text!r}"
    raise ConfigError(message)


def _write(kind: str, name: str, data: dict[str, object] | None = None) -> None:
    event: dict[str, object] = {"type": kind, "id": name}
    if data is not None:
        event["data"] = data
    sys.stdout.write(lean_json.dumps(event) + "\n")
    sys.stdout.flush()


def events_command(root: str, words: list[str]) -> int:
    """Prints statistics, once with --stats or again and again, and tells of kills."""
    arguments = parse(words, "interval", "stats")
    state = State.load(root, arguments.only_id())
    if state.status == "stopped":
        message = f"container with id {state.name} is not running"
        raise StateError(message)
    group = state.group or Group([])
    if "stats" in arguments:
        _write("stats", state.name, stats.collect(group))
        return 0
    interval = _seconds(arguments.text("interval", "5s"))
    kills, due = stats.oom_kills(group), time.monotonic()
    while state.alive:
        if time.monotonic() >= due:
            _write("stats", state.name, stats.collect(group))
            due += interval
        now = stats.oom_kills(group)
        for _kill in range(now - kills):
            _write("oom", state.name)
        kills = now
        time.sleep(min(_LOOK_S, max(due - time.monotonic(), 0.01)))
    return 0

"""pause, resume, update."""

from __future__ import annotations

import sys

from ringfence.container import lean_json
from ringfence.container.fields import Fields
from ringfence.container.oci.options import Arguments, parse
from ringfence.container.state import State
from ringfence.errors import ConfigError, StateError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.cgroups.group import Group

__all__ = ["pause_command", "resume_command", "update_command"]

# Option: the table and the field of the resources that it changes.
_NUMBERS = {
    "blkio-weight": ("blockIO", "weight"),
    "cpu-period": ("cpu", "period"),
    "cpu-quota": ("cpu", "quota"),
    "cpu-burst": ("cpu", "burst"),
    "cpu-rt-period": ("cpu", "realtimePeriod"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
    "cpu-share": ("cpu", "shares"),
    "cpu-idle": ("cpu", "idle"),
    "memory": ("memory", "limit"),
    "memory-reservation": ("memory", "reservation"),
    "memory-swap": ("memory", "swap"),
    "pids-limit": ("pids", "limit"),
}
_TEXTS = {"cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems")}
_IGNORED = "kernel-memory kernel-memory-tcp l3-cache-schema mem-bw-schema"
_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "b": 1}


def _group(state: State) -> Group:
    if state.group is None:
        message = f"{state.name} has no cgroups"
        raise StateError(message)
    return state.group


def pause_command(root: str, words: list[str]) -> int:
    """Stops every process of a container where it is."""
    state = State.load(root, parse(words, "", "").only_id())
    status = state.status
    if status not in {"running", "created"}:
        message = f"container not running or created: {status}"
        raise StateError(message)
    _group(state).freeze(frozen=True)
    return 0


def resume_command(root: str, words: list[str]) -> int:
    """Lets a paused container go on."""
    state = State.load(root, parse(words, "", "").only_id())
    if state.status != "paused":
        message = "container not paused"
        raise StateError(message)
    _group(state).freeze(frozen=False)
    return 0


def _amount(text: str) -> int:
    text = text.strip().lower()
    unit = _UNITS.get(text[-1:], 0)
    digits = text[:-1] if unit else text
    try:
        return int(digits) * (unit or 1)
    except ValueError as error:
        message = f"{text!r} isn't a number, or a number with k, m, g or t"
        raise ConfigError(message) from error


def _resources(arguments: Arguments) -> Fields:
    path = arguments.text("resources")
    if path:
        if path == "-":
            return Fields(lean_json.loads(sys.stdin.read(), "standard input"), "resources")
        with open(path, "rb") as file:
            return Fields(lean_json.loads(file.read(), path), "resources")
    tables: dict[str, dict[str, object]] = {}
    for option, (table, field) in _NUMBERS.items():
        if option in arguments:
            tables.setdefault(table, {})[field] = _amount(arguments.text(option))
    for option, (table, field) in _TEXTS.items():
        if option in arguments:
            tables.setdefault(table, {})[field] = arguments.text(option)
    return Fields(tables, "resources")


def _refuse_inner(resources: Fields) -> None:
    """What a machine has of its own since its start."""
    for name in ("memory", "pids"):
        if resources.table(name).values:
            message = f"{name}: a virtual machine has what it was started with"
            raise UnsupportedError(message)


def update_command(root: str, words: list[str]) -> int:
    """Changes a running container's limits."""
    valued = f"resources/r {' '.join(_NUMBERS)} {' '.join(_TEXTS)} {_IGNORED}"
    arguments = parse(words, valued, "")
    state = State.load(root, arguments.only_id())
    if state.status == "stopped":
        message = "container not running"
        raise StateError(message)
    resources = _resources(arguments)
    if state.machine:
        _refuse_inner(resources)
    _group(state).limit(resources)
    return 0

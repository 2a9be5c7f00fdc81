"""What a container uses, in the form that runc's ``events`` prints, from either version.

Source: runc's types/events.go for the names; the kernel's cgroup documentation for the files.
Memory is in bytes, processor time in nanoseconds.
"""

from __future__ import annotations

from ringfence.container.cgroups import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.cgroups.group import Group

__all__ = ["collect", "oom_kills"]

_UNLIMITED = 2**64 - 1


def _limit(path: str) -> int:
    text = files.read(path).strip()
    return int(text) if text.isdigit() else _UNLIMITED


def collect(group: Group) -> dict[str, object]:
    """The statistics of a container; what the host doesn't count is left out."""
    found: dict[str, object] = {}
    for names, path, version in group.directories:
        for name in names:
            reader = (_FIRST if version == 1 else _SECOND).get(name)
            if reader is not None:
                found.update(reader(path))
        if version == 2 and "cpu" not in found:
            found.update(_cpu_second(path))
    cpu = found.get("cpu")
    if isinstance(cpu, dict):
        accounting, throttling = found.pop("cpuacct", None), cpu.get("throttling")
        if accounting is not None:
            found["cpu"] = {"usage": accounting, "throttling": throttling or {}}
    return found


def _memory_first(path: str) -> dict[str, object]:
    def entry(prefix: str) -> dict[str, int]:
        return {
            "usage": files.read_integer(f"{path}/{prefix}.usage_in_bytes"),
            "max": files.read_integer(f"{path}/{prefix}.max_usage_in_bytes"),
            "failcnt": files.read_integer(f"{path}/{prefix}.failcnt"),
            "limit": files.read_integer(f"{path}/{prefix}.limit_in_bytes"),
        }

    raw = files.read_table(f"{path}/memory.stat")
    memory: dict[str, object] = {"usage": entry("memory"), "raw": raw, "cache": raw.get("cache", 0)}
    if files.read(f"{path}/memory.memsw.usage_in_bytes"):
        memory["swap"] = entry("memory.memsw")
    return {"memory": memory}


def _memory_second(path: str) -> dict[str, object]:
    raw = files.read_table(f"{path}/memory.stat")
    events = files.read_table(f"{path}/memory.events")

    def entry(prefix: str) -> dict[str, int]:
        return {
            "usage": files.read_integer(f"{path}/{prefix}.current"),
            "max": files.read_integer(f"{path}/{prefix}.peak"),
            "failcnt": events.get("max", 0),
            "limit": _limit(f"{path}/{prefix}.max"),
        }

    memory: dict[str, object] = {"usage": entry("memory"), "raw": raw, "cache": raw.get("file", 0)}
    if files.read(f"{path}/memory.swap.current"):
        memory["swap"] = entry("memory.swap")
    return {"memory": memory}


def _throttling(table: dict[str, int], unit: int) -> dict[str, int]:
    return {
        "periods": table.get("nr_periods", 0),
        "throttledPeriods": table.get("nr_throttled", 0),
        "throttledTime": table.get("throttled_time", table.get("throttled_usec", 0)) * unit,
    }


def _cpu_first(path: str) -> dict[str, object]:
    return {"cpu": {"throttling": _throttling(files.read_table(f"{path}/cpu.stat"), 1)}}


def _accounting(path: str) -> dict[str, object]:
    return {
        "cpuacct": {
            "total": files.read_integer(f"{path}/cpuacct.usage"),
            "percpu": [int(word) for word in files.read(f"{path}/cpuacct.usage_percpu").split()],
            "kernel": files.read_integer(f"{path}/cpuacct.usage_sys"),
            "user": files.read_integer(f"{path}/cpuacct.usage_user"),
        }
    }


def _cpu_second(path: str) -> dict[str, object]:
    table = files.read_table(f"{path}/cpu.stat")
    if not table:
        return {}
    usage = {
        "total": table.get("usage_usec", 0) * 1000,
        "kernel": table.get("system_usec", 0) * 1000,
        "user": table.get("user_usec", 0) * 1000,
    }
    return {"cpu": {"usage": usage, "throttling": _throttling(table, 1000)}}


def _pids(path: str) -> dict[str, object]:
    limit = files.read(f"{path}/pids.max").strip()
    return {
        "pids": {
            "current": files.read_integer(f"{path}/pids.current"),
            "limit": int(limit) if limit.isdigit() else 0,
        }
    }


def _block_first(path: str) -> dict[str, object]:
    def entries(name: str) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for line in files.read(f"{path}/{name}").splitlines():
            words = line.split()
            if len(words) == 3:
                major, _, minor = words[0].partition(":")
                found.append(
                    {
                        "major": int(major),
                        "minor": int(minor),
                        "op": words[1],
                        "value": int(words[2]),
                    }
                )
        return found

    return {
        "blkio": {
            "ioServiceBytesRecursive": entries("blkio.throttle.io_service_bytes_recursive"),
            "ioServicedRecursive": entries("blkio.throttle.io_serviced_recursive"),
        }
    }


def _block_second(path: str) -> dict[str, object]:
    sizes: list[dict[str, object]] = []
    counts: list[dict[str, object]] = []
    names = {"rbytes": (sizes, "Read"), "wbytes": (sizes, "Write"), "rios": (counts, "Read"),
             "wios": (counts, "Write")}  # fmt: skip
    for line in files.read(f"{path}/io.stat").splitlines():
        number, *pairs = line.split()
        major, _, minor = number.partition(":")
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key in names:
                list_, operation = names[key]
                list_.append(
                    {"major": int(major), "minor": int(minor), "op": operation, "value": int(value)}
                )
    return {"blkio": {"ioServiceBytesRecursive": sizes, "ioServicedRecursive": counts}}


_FIRST = {
    "memory": _memory_first,
    "cpu": _cpu_first,
    "cpuacct": _accounting,
    "pids": _pids,
    "blkio": _block_first,
}
_SECOND = {"memory": _memory_second, "cpu": _cpu_second, "pids": _pids, "io": _block_second}


def oom_kills(group: Group) -> int:
    """How often the kernel has killed a process of the container for its memory limit."""
    place = group.directory("memory")
    if place is None:
        return 0
    first = files.read_table(f"{place}/memory.oom_control")
    return first.get("oom_kill", files.read_table(f"{place}/memory.events").get("oom_kill", 0))

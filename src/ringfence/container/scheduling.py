"""How a process is scheduled, where it runs and where its memory comes from, in the kernel's numbers.

Source: OCI runtime-spec, config.md "Process"; linux/sched.h, linux/mempolicy.h.
"""

from __future__ import annotations

from ringfence.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields

__all__ = ["compile_process", "processors"]

_POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
_MEMORY_MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
_MEMORY_FLAGS = {
    "MPOL_F_NUMA_BALANCING": 1 << 13,
    "MPOL_F_RELATIVE_NODES": 1 << 14,
    "MPOL_F_STATIC_NODES": 1 << 15,
}
# More than any kernel is built for.
_MOST = 1 << 16


def _one_of(table: dict[str, int], name: str, place: str) -> int:
    if name not in table:
        message = f"{place}: there is no {name!r}"
        raise ConfigError(message)
    return table[name]


def processors(text: str, place: str) -> list[int]:
    """A list such as ``0-3,7`` as words of 64 bits.

    Raises:
        ConfigError: It isn't one.
    """
    bits = 0
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            message = f"{place}: {text!r} isn't a list of numbers such as 0-3,7"
            raise ConfigError(message)
        low, high = int(first), int(last or first)
        if low > high or high >= _MOST:
            message = f"{place}: {part!r} isn't a range"
            raise ConfigError(message)
        bits |= ((1 << (high - low + 1)) - 1) << low
    return [bits >> at & (1 << 64) - 1 for at in range(0, max(bits.bit_length(), 1), 64)]


def compile_process(plan: dict[str, object], process: Fields, linux: Fields) -> None:
    """Adds what a process's configuration says of it to its plan.

    Raises:
        ConfigError: A name isn't known, or a list isn't one.
    """
    scheduler = process.table("scheduler")
    if scheduler.values:
        plan["scheduler"] = {
            "policy": _one_of(_POLICIES, scheduler.text("policy"), f"{scheduler.place}.policy"),
            "flags": sum(
                _one_of(_FLAGS, name, f"{scheduler.place}.flags")
                for name in dict.fromkeys(scheduler.texts("flags"))
            ),
            **{
                name: scheduler.integer(name)
                for name in ("nice", "priority", "runtime", "deadline", "period")
            },
        }
    final = process.table("execCPUAffinity").text("final")
    if final:
        plan["affinity"] = processors(final, "process.execCPUAffinity.final")
    if "memoryPolicy" in linux:
        plan["memory_policy"] = _memory_policy(linux.table("memoryPolicy"))


def _memory_policy(policy: Fields) -> dict[str, object]:
    # In runc's words; one without a mode is a mistake there too.
    mode = _one_of(_MEMORY_MODES, policy.text("mode"), "invalid memory policy mode")
    for name in dict.fromkeys(policy.texts("flags")):
        mode |= _one_of(_MEMORY_FLAGS, name, "invalid memory policy flag")
    nodes = policy.text("nodes")
    words = processors(nodes, "invalid memory policy nodes") if nodes else []
    count = sum(word.bit_count() for word in words)
    if policy.text("mode") in {"MPOL_DEFAULT", "MPOL_LOCAL"} and count:
        message = f"memory policy mode requires 0 nodes but got {count}"
        raise ConfigError(message)
    if policy.text("mode") not in {"MPOL_DEFAULT", "MPOL_LOCAL", "MPOL_PREFERRED"} and not count:
        message = "memory policy mode requires at least one node but got 0"
        raise ConfigError(message)
    return {"mode": mode, "nodes": words}

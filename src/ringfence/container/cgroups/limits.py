"""Limits of the runtime specification as writes to the kernel's files, for both versions.

The conversions between the versions' units (shares and weights) are the specification's own
(OCI runtime-spec, config-linux.md), so that one document means one thing everywhere.
"""

from __future__ import annotations

import os

from ringfence.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields

__all__ = ["Write", "first_version", "second_version", "weight_of_shares", "where"]

# Controller, file, value.
Write = tuple[str, str, str]

_V1_MEMORY = (
    ("reservation", "memory.soft_limit_in_bytes"),
    ("kernel", "memory.kmem.limit_in_bytes"),
    ("kernelTCP", "memory.kmem.tcp.limit_in_bytes"),
)
_V1_CPU = (
    ("shares", "cpu.shares"),
    ("idle", "cpu.idle"),
    ("realtimePeriod", "cpu.rt_period_us"),
    ("realtimeRuntime", "cpu.rt_runtime_us"),
)
_THROTTLES = (
    ("throttleReadBpsDevice", "blkio.throttle.read_bps_device", "rbps"),
    ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device", "wbps"),
    ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device", "riops"),
    ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device", "wiops"),
)


def weight_of_shares(shares: int) -> int:
    """Version 2's weight (1 to 10000) of version 1's shares (2 to 262144).

    A curve through least, default (1024 is 100) and most, as runc and crun have it today.
    """
    import math

    if shares <= 2:
        return 1
    if shares >= 262_144:
        return 10_000
    power = math.log2(shares)
    return math.ceil(10 ** ((power * power + 125 * power) / 612 - 7 / 34))


def first_version(resources: Fields) -> list[Write]:
    """The writes of version 1, in an order that the kernel takes."""
    writes = _v1_memory(resources.table("memory"))
    cpu = resources.table("cpu")
    writes += [("cpu", file, str(cpu.integer(name))) for name, file in _V1_CPU if name in cpu]
    # The period first: a quota is checked against it.
    if "period" in cpu and cpu.integer("period"):
        writes.append(("cpu", "cpu.cfs_period_us", str(cpu.integer("period"))))
    if "quota" in cpu and cpu.integer("quota"):
        writes.append(("cpu", "cpu.cfs_quota_us", str(cpu.integer("quota"))))
    if "burst" in cpu:
        writes.append(("cpu", "cpu.cfs_burst_us", str(cpu.integer("burst"))))
    for name in ("cpus", "mems"):
        if cpu.text(name):
            writes.append(("cpuset", f"cpuset.{name}", cpu.text(name)))
    writes += _pids(resources)
    block = resources.table("blockIO")
    for name, file in (("weight", "blkio.weight"), ("leafWeight", "blkio.leaf_weight")):
        if block.integer(name):
            writes.append(("blkio", file, str(block.integer(name))))
        writes += [
            ("blkio", f"{file}_device", f"{_number(entry)} {entry.integer(name)}")
            for entry in block.tables("weightDevice")
            if entry.integer(name)
        ]
    for name, file, _key in _THROTTLES:
        writes += [
            ("blkio", file, f"{_number(entry)} {entry.integer('rate')}")
            for entry in block.tables(name)
        ]
    writes += [
        (
            "hugetlb",
            f"hugetlb.{page.text('pageSize') or page.text('pagesize')}.limit_in_bytes",
            str(page.integer("limit")),
        )
        for page in resources.tables("hugepageLimits")
    ]
    network = resources.table("network")
    if network.integer("classID"):
        writes.append(("net_cls", "net_cls.classid", str(network.integer("classID"))))
    writes += [
        ("net_prio", "net_prio.ifpriomap", f"{entry.text('name')} {entry.integer('priority')}")
        for entry in network.tables("priorities")
    ]
    return writes


def _v1_memory(memory: Fields) -> list[Write]:
    writes: list[Write] = []
    limit, swap = memory.optional_integer("limit"), memory.optional_integer("swap")
    if limit == -1 and swap is None:
        swap = -1
    if limit:
        writes.append(("memory", "memory.limit_in_bytes", str(limit)))
    if swap:
        writes.append(("memory", "memory.memsw.limit_in_bytes", str(swap)))
    for name, file in _V1_MEMORY:
        # Limits of the kernel's own memory are taken and ignored by today's kernels.
        if memory.integer(name) and name == "reservation":
            writes.append(("memory", file, str(memory.integer(name))))
    if memory.flag("disableOOMKiller"):
        writes.append(("memory", "memory.oom_control", "1"))
    swappiness = memory.optional_integer("swappiness")
    if swappiness is not None:
        if not 0 <= swappiness <= 100:
            message = f"{memory.place}.swappiness must be 0 to 100, not {swappiness}"
            raise ConfigError(message)
        writes.append(("memory", "memory.swappiness", str(swappiness)))
    return writes


def _pids(resources: Fields) -> list[Write]:
    limit = resources.table("pids").optional_integer("limit")
    if limit is None:
        return []
    # Nothing runs with none; runc takes it as one, which systemd's least is too.
    return [("pids", "pids.max", str(max(limit, 1)) if limit >= 0 else "max")]


def _number(entry: Fields) -> str:
    return f"{entry.integer('major')}:{entry.integer('minor')}"


def where(directory: str, file: str, value: str) -> tuple[str, str]:
    """The file that takes a weight of block devices here, and the value as it wants it.

    It depends on the scheduler that the kernel was built with.
    """
    if "weight" not in file or os.path.exists(f"{directory}/{file}"):
        return file, value
    if file.startswith("blkio.weight"):
        return file.replace("blkio.", "blkio.bfq."), value
    if file == "io.bfq.weight":
        device, _, weight = value.rpartition(" ")
        # 10 to 1000 becomes 1 to 10000.
        return "io.weight", f"{device or 'default'} {1 + (int(weight) - 10) * 9999 // 990}"
    return file, value


def _maximum(value: int) -> str:
    return "max" if value < 0 else str(value)


def second_version(resources: Fields) -> list[Write]:
    """The writes of version 2."""
    writes = _v2_memory(resources.table("memory"))
    cpu = resources.table("cpu")
    if cpu.integer("idle"):
        writes.append(("cpu", "cpu.idle", str(cpu.integer("idle"))))
    if cpu.integer("shares"):
        writes.append(("cpu", "cpu.weight", str(weight_of_shares(cpu.integer("shares")))))
    quota, period = cpu.integer("quota"), cpu.integer("period")
    if quota or period:
        amount = str(quota) if quota > 0 else "max"
        writes.append(("cpu", "cpu.max", f"{amount} {period or 100_000}"))
    if "burst" in cpu:
        writes.append(("cpu", "cpu.max.burst", str(cpu.integer("burst"))))
    for name in ("cpus", "mems"):
        if cpu.text(name):
            writes.append(("cpuset", f"cpuset.{name}", cpu.text(name)))
    writes += _pids(resources)
    block = resources.table("blockIO")
    weight = block.integer("weight")
    if weight:
        writes.append(("io", "io.bfq.weight", str(weight)))
    writes += [
        ("io", "io.bfq.weight", f"{_number(entry)} {entry.integer('weight')}")
        for entry in block.tables("weightDevice")
        if entry.integer("weight")
    ]
    for name, _file, key in _THROTTLES:
        writes += [
            ("io", "io.max", f"{_number(entry)} {key}={entry.integer('rate') or 'max'}")
            for entry in block.tables(name)
        ]
    writes += [
        (
            "hugetlb",
            f"hugetlb.{page.text('pageSize') or page.text('pagesize')}.max",
            str(page.integer("limit")),
        )
        for page in resources.tables("hugepageLimits")
    ]
    for name, value in resources.mapping("unified").items():
        if "/" in name or "." not in name:
            message = f"{resources.place}.unified: {name!r} isn't the name of a cgroup file"
            raise ConfigError(message)
        writes.append((name.partition(".")[0], name, value))
    return writes


def _v2_memory(memory: Fields) -> list[Write]:
    writes: list[Write] = []
    limit, swap = memory.optional_integer("limit"), memory.optional_integer("swap")
    if limit:
        writes.append(("memory", "memory.max", _maximum(limit)))
    if swap:
        # Version 1 counts memory and swap together, version 2 swap alone.
        if swap > 0 and (limit is None or limit <= 0):
            message = f"{memory.place}.swap needs a memory limit: it counts both together"
            raise ConfigError(message)
        if swap > 0 and limit is not None and swap < limit:
            message = f"{memory.place}.swap must not be less than the memory limit {limit}"
            raise ConfigError(message)
        alone = swap - limit if swap > 0 and limit is not None else swap
        writes.append(("memory", "memory.swap.max", _maximum(alone)))
    elif limit == -1:
        writes.append(("memory", "memory.swap.max", "max"))
    if memory.integer("reservation"):
        writes.append(("memory", "memory.low", _maximum(memory.integer("reservation"))))
    return writes

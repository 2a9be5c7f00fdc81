"""The configuration that ``spec`` writes: a shell, confined as the field does it by default."""

from __future__ import annotations

import os

__all__ = ["MASKED", "READ_ONLY", "mounts", "template"]

MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
    "/proc/interrupts", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_SMALL = ["nosuid", "noexec", "nodev"]
_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]


def mounts(*, rootless: bool) -> list[dict[str, object]]:
    """What every container has mounted."""
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    system: dict[str, object] = {
        "destination": "/sys",
        "type": "none" if rootless else "sysfs",
        "source": "/sys" if rootless else "sysfs",
        "options": ["rbind", *_SMALL, "ro"] if rootless else [*_SMALL, "ro"],
    }
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            # A single mapped group has no group 5.
            "options": terminals if rootless else [*terminals, "gid=5"],
        },
        {
            "destination": "/dev/shm",  # noqa: S108 - a mount's place in the container
            "type": "tmpfs",
            "source": "shm",
            "options": [*_SMALL, "mode=1777", "size=65536k"],
        },
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _SMALL},
        system,
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": [*_SMALL, "relatime", "ro"],
        },
    ]


def template(*, rootless: bool) -> dict[str, object]:
    """The whole configuration."""
    kinds = ["pid", "ipc", "uts", "mount"]
    linux: dict[str, object] = {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [
            {"type": kind} for kind in ([*kinds, "user"] if rootless else [*kinds, "network"])
        ],
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READ_ONLY),
    }
    if rootless:
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
        del linux["resources"]
    return {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "ringfence",
        "mounts": mounts(rootless=rootless),
        "linux": linux,
    }

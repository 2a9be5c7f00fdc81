"""Capabilities by name. Source: linux/capability.h; the default set is the field's."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringfence.container.fields import Fields

__all__ = ["DEFAULT", "NAMES", "SETS", "mask", "sets"]

SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")

NAMES = tuple(
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ]
)

# What Docker and Podman give: enough for ordinary servers, nothing of the host's. No MKNOD, which
# device rules make useless, and no NET_RAW, by which neighbours on one network are impersonated.
DEFAULT = tuple(
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "NET_BIND_SERVICE",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_CHROOT",
    ]
)


def mask(names: Iterable[str]) -> int:
    """The bits of named capabilities; a name that this kernel's headers lack has no bit.

    Runtimes are told to ignore unknown names, with a warning, so that a newer engine can ask.
    """
    bits = 0
    for name in names:
        if name in NAMES:
            bits |= 1 << NAMES.index(name)
    return bits


def sets(table: Fields) -> dict[str, int]:
    """The sets of a configuration's ``process.capabilities``; one that isn't there is empty."""
    return {name: mask(table.texts(name)) for name in SETS}

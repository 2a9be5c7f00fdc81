"""The system calls that containers get by default: all that are known, but for what follows.

Left out is what the container's capabilities make useless anyway, what reaches through namespaces,
what young kernels still find faults in, and what no ordinary program calls. It is the set that the
field agrees on (Docker's and Podman's defaults), written as what is refused; calls younger than the
table don't exist for the container.
"""

from __future__ import annotations

import functools

from ringfence.container import seccomp, syscalls
from ringfence.container.fields import Fields

__all__ = ["compiled", "profile"]

_REFUSED = frozenset(
    [
        "acct",
        "add_key",
        "bpf",
        "clock_adjtime",
        "clock_adjtime64",
        "clock_settime",
        "clock_settime64",
        "create_module",
        "delete_module",
        "finit_module",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "get_kernel_syms",
        "get_mempolicy",
        "init_module",
        "io_uring_enter",
        "io_uring_register",
        "io_uring_setup",
        "ioperm",
        "iopl",
        "kcmp",
        "kexec_file_load",
        "kexec_load",
        "keyctl",
        "listmount",
        "lookup_dcookie",
        "lsm_list_modules",
        "lsm_set_self_attr",
        "mbind",
        "migrate_pages",
        "mount",
        "mount_setattr",
        "move_mount",
        "move_pages",
        "name_to_handle_at",
        "nfsservctl",
        "open_by_handle_at",
        "open_tree",
        "open_tree_attr",
        "perf_event_open",
        "pivot_root",
        "query_module",
        "quotactl",
        "quotactl_fd",
        "reboot",
        "request_key",
        "set_mempolicy",
        "set_mempolicy_home_node",
        "setns",
        "settimeofday",
        "statmount",
        "stime",
        "swapoff",
        "swapon",
        "_sysctl",
        "sysfs",
        "syslog",
        "umount",
        "umount2",
        "unshare",
        "uselib",
        "userfaultfd",
        "ustat",
        "vhangup",
        "vm86",
        "vm86old",
    ]
)
_BY_ARGUMENT = frozenset({"clone", "clone3", "ioctl", "personality", "socket"})
_ALLOW, _ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97

# CLONE_NEW*, but for CLONE_NEWTIME, which clone takes for part of the signal's number.
_NAMESPACES = 0x7E02_0000
# Input that a terminal is made to have typed; the console's clipboard.
_TERMINAL_INPUT, _CONSOLE = 0x5412, 0x541C
# Host vsock, and the kernel's ciphers by sockets.
_VSOCK, _CIPHERS = 40, 38
_PERSONALITIES = (0x0, 0x8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF)


def _rule(
    name: str, action: str, errno: int = 0, args: list[dict[str, object]] | None = None
) -> dict[str, object]:
    rule: dict[str, object] = {"names": [name], "action": action, "args": args or []}
    if errno:
        rule["errnoRet"] = errno
    return rule


def _argument(index: int, operation: str, value: int, second: int = 0) -> dict[str, object]:
    return {"index": index, "op": f"SCMP_CMP_{operation}", "value": value, "valueTwo": second}


def profile() -> dict[str, object]:
    """The profile as ``linux.seccomp`` has it, for this machine's calls of both widths."""
    known = {*syscalls.X86_64, *syscalls.I386, *syscalls.AARCH64}
    rules = [
        {"names": sorted(known - _REFUSED - _BY_ARGUMENT), "action": _ALLOW},
        _rule("clone", _ALLOW, args=[_argument(0, "MASKED_EQ", _NAMESPACES, 0)]),
        # Its flags are in memory, where a filter can't look; libraries then call clone.
        _rule("clone3", _ERRNO, _ENOSYS),
        # Compared by their low halves alone, as the kernel does.
        _rule("ioctl", _ERRNO, _EPERM, [_argument(1, "MASKED_EQ", 0xFFFF_FFFF, _TERMINAL_INPUT)]),
        _rule("ioctl", _ERRNO, _EPERM, [_argument(1, "MASKED_EQ", 0xFFFF_FFFF, _CONSOLE)]),
        _rule("ioctl", _ALLOW),
        *(_rule("personality", _ALLOW, args=[_argument(0, "EQ", n)]) for n in _PERSONALITIES),
        _rule("socket", _ERRNO, _EAFNOSUPPORT, [_argument(0, "MASKED_EQ", 0xFFFF_FFFF, _VSOCK)]),
        _rule("socket", _ERRNO, _EAFNOSUPPORT, [_argument(0, "MASKED_EQ", 0xFFFF_FFFF, _CIPHERS)]),
        _rule("socket", _ALLOW),
    ]
    return {
        "defaultAction": _ERRNO,
        "defaultErrnoRet": _EPERM,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": rules,
    }


@functools.cache
def compiled() -> dict[str, object]:
    """The profile as a filter for this host's processor."""
    flags, program = seccomp.packed(Fields(profile()))
    return {"flags": flags, "program": program}

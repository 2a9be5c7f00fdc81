"""The kernel's numbers that plans are made of. Source: linux/mount.h, linux/sched.h."""

from __future__ import annotations

__all__ = [
    "ATTRIBUTES",
    "FILESYSTEM_FLAGS",
    "NAMESPACES",
    "NAMESPACE_FILES",
    "PROPAGATION",
    "RLIMITS",
]

# As the runtime specification names them.
NAMESPACES = {
    "user": 0x1000_0000,
    "mount": 0x0002_0000,
    "pid": 0x2000_0000,
    "network": 0x4000_0000,
    "uts": 0x0400_0000,
    "ipc": 0x0800_0000,
    "cgroup": 0x0200_0000,
    "time": 0x0000_0080,
}
# Their files in /proc/PID/ns.
NAMESPACE_FILES = {
    "user": "user",
    "mount": "mnt",
    "pid": "pid",
    "network": "net",
    "uts": "uts",
    "ipc": "ipc",
    "cgroup": "cgroup",
    "time": "time",
}

_RECURSIVE = 0x4000
PROPAGATION = {
    "unbindable": 1 << 17,
    "private": 1 << 18,
    "slave": 1 << 19,
    "shared": 1 << 20,
    "runbindable": 1 << 17 | _RECURSIVE,
    "rprivate": 1 << 18 | _RECURSIVE,
    "rslave": 1 << 19 | _RECURSIVE,
    "rshared": 1 << 20 | _RECURSIVE,
}

# Option: bits of mount(2) to set, bits to clear.
FILESYSTEM_FLAGS = {
    "defaults": (0, 0),
    "ro": (1, 0),
    "rw": (0, 1),
    "nosuid": (2, 0),
    "suid": (0, 2),
    "nodev": (4, 0),
    "dev": (0, 4),
    "noexec": (8, 0),
    "exec": (0, 8),
    "sync": (16, 0),
    "async": (0, 16),
    "remount": (32, 0),
    "mand": (64, 0),
    "nomand": (0, 64),
    "dirsync": (128, 0),
    "nosymfollow": (256, 0),
    "symfollow": (0, 256),
    "noatime": (1024, 0),
    "atime": (0, 1024),
    "nodiratime": (2048, 0),
    "diratime": (0, 2048),
    "relatime": (1 << 21, 0),
    "norelatime": (0, 1 << 21),
    "iversion": (1 << 23, 0),
    "noiversion": (0, 1 << 23),
    "strictatime": (1 << 24, 0),
    "nostrictatime": (0, 1 << 24),
    "silent": (1 << 15, 0),
    "loud": (0, 1 << 15),
    "acl": (1 << 16, 0),
    "noacl": (0, 1 << 16),
}

_ATIME = 0x70
# Option: bits of mount_setattr(2) to set, bits to clear. A time option clears the others.
ATTRIBUTES = {
    "ro": (1, 0),
    "rw": (0, 1),
    "nosuid": (2, 0),
    "suid": (0, 2),
    "nodev": (4, 0),
    "dev": (0, 4),
    "noexec": (8, 0),
    "exec": (0, 8),
    "noatime": (0x10, _ATIME),
    "atime": (0, _ATIME),
    "relatime": (0, _ATIME),
    "norelatime": (0x20, _ATIME),
    "strictatime": (0x20, _ATIME),
    "nostrictatime": (0, _ATIME),
    "nodiratime": (0x80, 0),
    "diratime": (0, 0x80),
    "nosymfollow": (0x20_0000, 0),
    "symfollow": (0, 0x20_0000),
}

RLIMITS = {
    "RLIMIT_CPU": 0,
    "RLIMIT_FSIZE": 1,
    "RLIMIT_DATA": 2,
    "RLIMIT_STACK": 3,
    "RLIMIT_CORE": 4,
    "RLIMIT_RSS": 5,
    "RLIMIT_NPROC": 6,
    "RLIMIT_NOFILE": 7,
    "RLIMIT_MEMLOCK": 8,
    "RLIMIT_AS": 9,
    "RLIMIT_LOCKS": 10,
    "RLIMIT_SIGPENDING": 11,
    "RLIMIT_MSGQUEUE": 12,
    "RLIMIT_NICE": 13,
    "RLIMIT_RTPRIO": 14,
    "RLIMIT_RTTIME": 15,
}

"""A bundle's ``config.json`` as a plan.

Source: OCI runtime-spec 1.2, config.md and config-linux.md. Where runc and the specification
differ, runc is followed, since engines are tested with it.
"""

from __future__ import annotations

import os

from ringfence.container import capabilities, flags, lean_json, mounts
from ringfence.container.cgroups import devices
from ringfence.container.cgroups.view import cgroup_mounts
from ringfence.container.fields import Fields
from ringfence.container.identity import Maps
from ringfence.errors import ConfigError, NotFoundError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.cgroups.group import Group

__all__ = [
    "Bundle",
    "compile_process",
    "device_links",
    "device_nodes",
    "namespace_paths",
]

_MAX_LIMIT = 2**64 - 1
_CHARACTER, _BLOCK, _FIFO = 0o020000, 0o060000, 0o010000
_TYPES = {"c": _CHARACTER, "u": _CHARACTER, "b": _BLOCK, "p": _FIFO}
_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
)
_PERSONALITIES = {"LINUX": 0, "LINUX32": 0x8}
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}


class Bundle:
    """A directory with a configuration, and the root file system that it names.

    Args:
        path: The directory.
    """

    __slots__ = ("config", "linux", "namespaces", "path", "process", "rootfs")

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        name = f"{self.path}/config.json"
        try:
            with open(name, "rb") as file:
                text = file.read()
        except FileNotFoundError as error:
            message = f"there is no bundle in {self.path}: config.json is missing"
            raise NotFoundError(message, hint="ringfence-oci spec --bundle DIR") from error
        self.config = Fields(lean_json.loads(text, name))
        self.linux = self.config.table("linux")
        self.process = self.config.table("process")
        root = self.config.table("root").text("path")
        if not root:
            message = "root.path is missing: a container needs a root file system"
            raise ConfigError(message)
        self.rootfs = os.path.realpath(os.path.join(self.path, root))
        if not os.path.isdir(self.rootfs):
            message = f"the root file system {self.rootfs} isn't a directory"
            raise ConfigError(message)
        self.namespaces = namespace_paths(self.linux)
        _refuse_unsupported(self.linux)
        if "netDevices" in self.linux:
            from ringfence.container import net_devices

            net_devices.check(self.linux, has_network="network" in self.namespaces)

    @property
    def terminal(self) -> bool:
        """Whether the process has a terminal."""
        return self.process.flag("terminal")

    @property
    def has_id_maps(self) -> bool:
        """Whether a mount is to have owners of its own."""
        return any(
            "uidMappings" in mount or not {"idmap", "ridmap"}.isdisjoint(mount.texts("options"))
            for mount in self.config.tables("mounts")
        )

    @property
    def makes_users(self) -> bool:
        """Whether the container has a user namespace of its own."""
        return self.namespaces.get("user") == ""

    def plan(self, group: Group | None) -> dict[str, object]:
        """The whole plan, but for descriptors.

        Args:
            group: The container's cgroups, for its view of them.
        """
        new = 0
        join = []
        for kind, path in self.namespaces.items():
            if path:
                join.append({"path": path, "kind": flags.NAMESPACES[kind]})
            elif kind != "cgroup":
                new |= flags.NAMESPACES[kind]
        maps = Maps.of(self.linux)
        own_users = self.makes_users
        plan: dict[str, object] = {
            "join": join,
            "unshare": new,
            "map_ids": own_users,
            "become_root": (own_users and maps.has_root) or bool(self.namespaces.get("user")),
            "cgroup_namespace": self.namespaces.get("cgroup") == "",
            "loopback": self.namespaces.get("network") == "",
            "sysctl": self.linux.mapping("sysctl"),
            "root": self._root(group),
        }
        for name in ("hostname", "domainname"):
            if self.config.text(name):
                plan[name] = self.config.text(name)
        offsets = self._time_offsets()
        if offsets:
            plan["time_offsets"] = offsets
        sets_groups = not own_users or maps.sets_groups
        plan["process"] = compile_process(self.process, self.linux, sets_groups=sets_groups)
        return plan

    def _time_offsets(self) -> str:
        lines = ""
        for clock in ("monotonic", "boottime"):
            entry = self.linux.table("timeOffsets").table(clock)
            if entry.values:
                lines += f"{clock} {entry.integer('secs')} {entry.integer('nanosecs')}\n"
        return lines

    def _root(self, group: Group | None) -> dict[str, object]:
        propagation = self.linux.text("rootfsPropagation") or "rslave"
        if propagation not in flags.PROPAGATION:
            message = f"linux.rootfsPropagation: there is no propagation {propagation!r}"
            raise ConfigError(message)
        compiled: list[dict[str, object]] = []
        links: list[tuple[str, str]] = []
        late: list[str] = []
        device_tree_bound = False
        for mount in self.config.tables("mounts"):
            if mount.text("type") == "cgroup":
                compiled += cgroup_mounts(mount, group, links, self.namespaces)
                continue
            entry = mounts.compile_mount(mount, self.path)
            target = str(entry["target"])
            if target.startswith(f"{self.rootfs}/"):
                # As runc has it: some engines say where it is on the host.
                entry["target"] = target.removeprefix(self.rootfs)
            if os.path.normpath(mount.text("destination")) == "/dev" and entry.get("flags"):
                late += _later(entry)
            bound = "filesystem" not in entry
            device_tree_bound |= bound and os.path.normpath(mount.text("destination")) == "/dev"
            compiled.append(entry)
        label = self.linux.text("mountLabel")
        if label:
            compiled = [_labelled(entry, label) for entry in compiled]
        return {
            "path": self.rootfs,
            "shared": "mount" not in self.namespaces,
            "propagation": flags.PROPAGATION[propagation] | 0x4000,
            "mounts": compiled,
            "devices": [] if device_tree_bound else self._devices(),
            "links": [*links, *([] if device_tree_bound else device_links())],
            # Twice hidden is once more to be undone, and no better.
            "late_read_only": late,
            "masked": list(dict.fromkeys(self.linux.texts("maskedPaths"))),
            "read_only_paths": self.linux.texts("readonlyPaths"),
            "read_only": self.config.table("root").flag("readonly"),
            "label": f'context="{label}"' if label else None,
        }

    def _devices(self) -> list[dict[str, object]]:
        bind = self.makes_users or bool(self.namespaces.get("user"))
        nodes = {str(node["path"]): node for node in device_nodes(bind=bind)}
        for entry in self.linux.tables("devices"):
            path, kind = entry.text("path"), entry.text("type")
            if kind not in _TYPES or not path.startswith("/"):
                message = f"{entry.place}: no device of type {kind!r} at {path!r}"
                raise ConfigError(message)
            mode = entry.integer("fileMode", 0o666) & 0o7777 | _TYPES[kind]
            numbers = entry.integer("major"), entry.integer("minor")
            owner = entry.integer("uid"), entry.integer("gid")
            nodes[path] = _node(path, mode, numbers, owner, bind=bind)
        return list(nodes.values())


def device_nodes(*, bind: bool) -> list[dict[str, object]]:
    """The devices that every container has."""
    return [
        _node(path, _CHARACTER | 0o666, (major, minor), (0, 0), bind=bind)
        for path, major, minor in devices.DEFAULT_NODES
    ]


def _node(
    path: str, mode: int, numbers: tuple[int, int], owner: tuple[int, int], *, bind: bool
) -> dict[str, object]:
    return {
        "path": path,
        "mode": mode,
        "major": numbers[0],
        "minor": numbers[1],
        "uid": owner[0],
        "gid": owner[1],
        "bind": bind,
    }


def _later(entry: dict[str, object]) -> list[str]:
    """A read-only ``/dev`` becomes that once its nodes are in it."""
    flags_given = entry["flags"]
    if not isinstance(flags_given, int) or not flags_given & 1:
        return []
    entry["flags"] = flags_given & ~1
    return ["/dev"]


def _labelled(entry: dict[str, object], label: str) -> dict[str, object]:
    if entry.get("filesystem") not in {"tmpfs", "devpts", "mqueue"}:
        return entry
    data = f'context="{label}"'
    return {**entry, "data": f"{entry['data']},{data}" if entry.get("data") else data}


def device_links() -> list[tuple[str, str]]:
    """The links of ``/dev``."""
    links = list(_LINKS)
    if os.path.exists("/proc/kcore"):
        links.append(("/dev/core", "/proc/kcore"))
    return links


def namespace_paths(linux: Fields) -> dict[str, str]:
    """Each namespace of the container with its file, empty for a new one.

    Raises:
        ConfigError: One is unknown, twice there, or has a relative path.
    """
    found: dict[str, str] = {}
    for entry in linux.tables("namespaces"):
        kind, path = entry.text("type"), entry.text("path")
        if kind not in flags.NAMESPACES:
            message = f"{entry.place}: there is no namespace of type {kind!r}"
            raise ConfigError(message)
        if kind in found:
            message = f"{entry.place}: the {kind} namespace is given twice"
            raise ConfigError(message)
        if path and not path.startswith("/"):
            message = f"{entry.place}: the path {path!r} isn't absolute"
            raise ConfigError(message)
        found[kind] = path
    hides = linux.texts("maskedPaths") or linux.texts("readonlyPaths")
    if "mount" not in found and hides:
        message = "unable to restrict sys entries without a private MNT namespace"
        raise ConfigError(message)
    return found


def _refuse_unsupported(linux: Fields) -> None:
    if linux.table("intelRdt").values:
        message = "linux.intelRdt: cache and memory bandwidth allocation isn't there"
        raise UnsupportedError(message)


def compile_process(process: Fields, linux: Fields, *, sets_groups: bool) -> dict[str, object]:
    """The process part of a plan; for exec too.

    Raises:
        ConfigError: It has no program, or a working directory that isn't absolute.
    """
    arguments, cwd = process.texts("args"), process.text("cwd") or "/"
    if not arguments:
        message = "process.args is empty: there is nothing to run"
        raise ConfigError(message)
    if not cwd.startswith("/"):
        message = f"process.cwd must be an absolute path, not {cwd!r}"
        raise ConfigError(message)
    user = process.table("user")
    groups = user.integers("additionalGids")
    if groups and not sets_groups:
        message = "process.user.additionalGids can't be set with a single group mapped"
        raise ConfigError(message)
    plan: dict[str, object] = {
        "args": arguments,
        "env": _environment(process.texts("env")),
        "cwd": cwd,
        "uid": user.integer("uid"),
        "gid": user.integer("gid"),
        "groups": groups if sets_groups else None,
        "umask": user.optional_integer("umask"),
        "capabilities": capabilities.sets(process.table("capabilities")),
        "no_new_privileges": process.flag("noNewPrivileges"),
        "limits": limits(process),
        "oom_score_adj": process.optional_integer("oomScoreAdj"),
    }
    if linux.table("seccomp").values:
        from ringfence.container import seccomp

        profile = linux.table("seccomp")
        number, program = seccomp.packed(profile)
        if number & seccomp.NEW_LISTENER and not profile.text("listenerPath"):
            message = "seccomp listenerPath is not set"
            raise ConfigError(message, hint="SCMP_ACT_NOTIFY needs somebody who decides")
        plan["seccomp"] = {"flags": number, "program": program}
    _security_labels(plan, process)
    _scheduling(plan, process, linux)
    return plan


def _environment(pairs: list[str]) -> list[str]:
    """Each variable once, with its last value; an empty HOME is one that isn't given."""
    last = {pair.partition("=")[0]: pair for pair in pairs if "=" in pair}
    return [pair for pair in last.values() if pair != "HOME="]


def limits(process: Fields) -> list[tuple[int, int, int]]:
    """Each ``RLIMIT_*`` of a configuration with its soft and its hard value.

    Raises:
        ConfigError: There is no such limit.
    """
    found = []
    for entry in process.tables("rlimits"):
        name = entry.text("type")
        if name not in flags.RLIMITS:
            message = f"{entry.place}: there is no limit {name!r}"
            raise ConfigError(message)
        soft, hard = entry.integer("soft"), entry.integer("hard")
        found.append((flags.RLIMITS[name], soft & _MAX_LIMIT, hard & _MAX_LIMIT))
    return found


def _security_labels(plan: dict[str, object], process: Fields) -> None:
    profile = process.text("apparmorProfile")
    if profile and profile != "unconfined":
        if not os.path.exists("/sys/kernel/security/apparmor"):
            message = f"the AppArmor profile {profile} is asked for, and this host has no AppArmor"
            raise UnsupportedError(message)
        plan["apparmor"] = profile
    label = process.text("selinuxLabel")
    if label:
        if not os.path.exists("/sys/fs/selinux/status"):
            message = f"the SELinux label {label} is asked for, and SELinux is off on this host"
            raise UnsupportedError(message)
        plan["selinux"] = label


def _scheduling(plan: dict[str, object], process: Fields, linux: Fields) -> None:
    domain = linux.table("personality").text("domain")
    if domain:
        if domain not in _PERSONALITIES:
            message = f"linux.personality.domain: there is no personality {domain!r}"
            raise ConfigError(message)
        plan["personality"] = _PERSONALITIES[domain]
    if "scheduler" in process or "execCPUAffinity" in process or "memoryPolicy" in linux:
        from ringfence.container import scheduling

        scheduling.compile_process(plan, process, linux)
    priority = process.table("ioPriority")
    if priority.values:
        kind = priority.text("class")
        if kind not in _IO_CLASSES:
            message = f"process.ioPriority.class: there is no class {kind!r}"
            raise ConfigError(message)
        plan["io_priority"] = _IO_CLASSES[kind] << 13 | priority.integer("priority")

"""A bundle as a machine: what of its configuration a virtual machine takes, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from ringfence.container import capabilities, seccomp
from ringfence.container.spec import limits
from ringfence.errors import ConfigError, UnsupportedError
from ringfence.guest.spec import Privileges
from ringfence.machine.spec import ENGINES, DirectoryRoot, MachineSpec, Mount, Timeouts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields
    from ringfence.container.spec import Bundle
    from ringfence.machine.spec import EngineName

__all__ = [
    "ANNOTATION",
    "check",
    "command",
    "engine_of",
    "host_resources",
    "machine_spec",
    "privileges",
]

# Says what runs a bundle: container, or an engine of virtual machines; vm is the best of them.
ANNOTATION = "org.ringfence.engine"
_ANY_VM = "vm"
_DEFAULT_MIB, _LEAST_MIB = 512, 128
_PERIOD_US = 100_000
_LONGEST_HOSTNAME = 63
# The guest has its own.
_OWN = ("/proc", "/sys", "/dev")
_IN_MEMORY = ("/run", "/tmp", "/var/tmp")  # noqa: S108 - places of the guest
_GIVEN = frozenset({"pid", "mount", "ipc", "uts", "cgroup", "network", "time"})


def engine_of(wanted: str) -> str:
    """What is to run a bundle, by its annotation or the runtime's option; empty for a container.

    Raises:
        ConfigError: There is no such engine.
    """
    if wanted in {"", "container"}:
        return ""
    engine = "auto" if wanted == _ANY_VM else wanted
    if engine not in ENGINES:
        message = f"there is no engine {wanted!r} to run the bundle"
        raise ConfigError(message, hint=f"choose one of {_ANY_VM}, {', '.join(ENGINES)}")
    return engine


def _below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def check(bundle: Bundle) -> None:
    """Refuses what a machine of its own can't have of the host's.

    Raises:
        UnsupportedError: The bundle asks for it.
    """
    for kind, path in bundle.namespaces.items():
        if path and kind not in {"network", "user"}:
            message = f"a virtual machine can't share the {kind} namespace {path}"
            raise UnsupportedError(message, hint="run it by ringfence-oci, as a container")
    if "pid" not in bundle.namespaces:
        message = "a virtual machine can't share the host's processes"
        raise UnsupportedError(message, hint="run it by ringfence-oci, as a container")
    for name in ("createContainer", "startContainer"):
        if list(bundle.config.table("hooks").tables(name)):
            message = f"hooks.{name}: they run in a container's namespaces, and this is a machine"
            raise UnsupportedError(message)
    if list(bundle.linux.tables("devices")):
        # Engines list none for themselves: a device of the host was asked for.
        message = "linux.devices: a virtual machine can't be given the host's devices"
        raise UnsupportedError(message, hint="run it by ringfence-oci, as a container")
    if bundle.linux.table("netDevices").values:
        message = "linux.netDevices: a virtual machine can't be given the host's network devices"
        raise UnsupportedError(message, hint="run it by ringfence-oci, as a container")
    privileges(bundle.process, bundle.linux)
    _mounts(bundle)


def _mounts(bundle: Bundle) -> list[Mount]:
    found: list[Mount] = []
    for entry in bundle.config.tables("mounts"):
        target = os.path.normpath(entry.text("destination"))
        options = entry.texts("options")
        if _below(target, _OWN):
            continue
        if not {"idmap", "ridmap"}.isdisjoint(options) or "uidMappings" in entry:
            message = f"{entry.place}: a virtual machine's mounts can't have ID maps"
            raise UnsupportedError(message)
        if not {"bind", "rbind"}.isdisjoint(options) or entry.text("type") == "bind":
            source = Path(bundle.path, entry.text("source"))
            found.append(
                Mount(source=source, target=PurePosixPath(target), read_only="ro" in options)
            )
        elif not (entry.text("type") == "tmpfs" and target in _IN_MEMORY):
            message = f"{entry.place}: a virtual machine has no {entry.text('type')} at {target}"
            raise UnsupportedError(message, hint="bind a directory there")
    # The last of several at one place is the one that is seen.
    return list({mount.target: mount for mount in found}.values())


def machine_spec(bundle: Bundle, name: str, engine: str, *, connected: bool) -> MachineSpec:
    """The machine for a bundle.

    Args:
        bundle: The bundle.
        name: The machine's name.
        engine: What runs it.
        connected: Whether it has a network.

    Raises:
        UnsupportedError: A machine can't have what the bundle asks for.
    """
    resources = bundle.linux.table("resources")
    limit = resources.table("memory").integer("limit")
    cpu = resources.table("cpu")
    quota, period = cpu.integer("quota"), cpu.integer("period") or _PERIOD_US
    vcpus = -(-quota // period) if quota > 0 else 1
    wanted: EngineName = engine  # type: ignore[assignment] # engine_of has checked it
    return MachineSpec(
        name=name,
        engine=wanted,
        vcpus=max(1, min(vcpus, os.cpu_count() or 1)),
        memory_mib=max(limit >> 20, _LEAST_MIB) if limit > 0 else _DEFAULT_MIB,
        root=DirectoryRoot(
            path=Path(bundle.rootfs),
            writable=not bundle.config.table("root").flag("readonly"),
        ),
        mounts=tuple(_mounts(bundle)),
        workdir=bundle.process.text("cwd") or "/",
        network="user" if connected else "none",
        hostname=bundle.config.text("hostname").partition(".")[0][:_LONGEST_HOSTNAME],
        timeouts=Timeouts(boot_s=120.0),
    )


def host_resources(resources: Fields) -> dict[str, object]:
    """What of the limits holds for the machine's processes on the host.

    Memory and processes inside are the guest's: the machine is as large as the limit says.
    """
    return {
        name: resources.values[name] for name in ("cpu", "blockIO", "network") if name in resources
    }


# Of a process, what the guest's kernel isn't told.
_NOT_TOLD = ("scheduler", "ioPriority", "execCPUAffinity")


def privileges(process: Fields, linux: Fields) -> Privileges:
    """What a program may do in the guest: as in a container, by the guest's own kernel.

    Raises:
        ConfigError: The configuration is malformed.
        UnsupportedError: It asks for what a guest's program isn't given.
    """
    for name in _NOT_TOLD:
        if name in process:
            message = f"process.{name}: a virtual machine's programs aren't given that"
            raise UnsupportedError(message, hint="run it by ringfence-oci, as a container")
    user, profile = process.table("user"), linux.table("seccomp")
    filter_ = seccomp.packed(profile) if profile.values else None
    if filter_ and filter_[0] & seccomp.NEW_LISTENER:
        message = "SCMP_ACT_NOTIFY: nobody of the host can decide a guest's system calls"
        raise UnsupportedError(message, hint="run it by ringfence-oci, as a container")
    return Privileges(
        groups=tuple(user.integers("additionalGids")),
        umask=user.optional_integer("umask"),
        capabilities=capabilities.sets(process.table("capabilities")),
        no_new_privileges=process.flag("noNewPrivileges"),
        limits=tuple(limits(process)),
        oom_score_adj=process.optional_integer("oomScoreAdj"),
        seccomp=filter_,
    )


def command(process: Fields) -> tuple[list[str], dict[str, str], str, str]:
    """A process's program and arguments, environment, directory and user.

    Raises:
        ConfigError: There is no program.
    """
    arguments = process.texts("args")
    if not arguments:
        message = "process.args is empty: there is nothing to run"
        raise ConfigError(message)
    pairs = (text.partition("=") for text in process.texts("env"))
    environment = {name: value for name, sign, value in pairs if name and sign}
    user = process.table("user")
    who = f"{user.integer('uid')}:{user.integer('gid')}"
    return arguments, environment, process.text("cwd") or "/", who

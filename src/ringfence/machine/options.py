"""What a machine is made of, said as keywords."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from ringfence.errors import ConfigError
from ringfence.machine.spec import (
    DirectoryRoot,
    DiskRate,
    DiskRoot,
    HostRoot,
    ImageRoot,
    MachineSpec,
    Mount,
    Root,
    Timeouts,
)
from ringfence.network.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ringfence.machine.spec import DiskFormat, EngineName, HugePages

__all__ = ["MachineOptions", "memory_mib", "spec_from"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_MIB = {"": 1.0, "k": 1 / 1024, "m": 1.0, "g": 1024.0, "t": 1024.0 * 1024}


class MachineOptions(TypedDict, total=False):
    """The keywords of :class:`ringfence.Machine` and :class:`ringfence.Sandbox`; all optional.

    The root file system is the host's own programs unless one of ``image``, ``root`` and ``disk``
    is given.
    """

    name: str
    """As ``ringfence ps`` shows it."""
    engine: EngineName
    """``auto``, ``kvm``, ``bt`` or ``container``."""
    vcpus: int
    """Virtual processors."""
    memory: int | str
    """RAM in MiB, or as text: ``"2G"``."""
    huge_pages: HugePages
    """``off``, ``transparent`` or ``reserved``: which pages of the host the RAM is made of."""
    image: str
    """An OCI image."""
    root: str | Path
    """A directory of the host."""
    disk: str | Path
    """A disk image; with it ``disk_format``."""
    disk_format: DiskFormat
    """``raw`` or ``qcow2``: never guessed."""
    disk_partition: int
    """The partition of the disk that is the root; found unless said."""
    disk_filesystem: str
    """What is on it; found unless said."""
    disk_bandwidth: int | str | None
    """Bytes a second of each disk: a number, or text such as ``"10M"``."""
    disk_iops: int | None
    """Requests a second of each disk."""
    writable: bool
    """Changes go to the directory or disk itself."""
    mounts: Iterable[Mount | str]
    """Parts of the host: ``"SRC:DST:ro"``."""
    workdir: str
    """Where commands run."""
    env: Mapping[str, str]
    """Environment of all commands."""
    user: str
    """Who runs commands."""
    network: str | Policy | Iterable[str]
    """How it is connected (``user``): a mode, a network's name, or egress rules for ``user``.

    Several networks are an interface each. ``"web,ip=10.5.0.9,mac=02:00:00:00:00:01"`` says more.
    """
    ip: str | Iterable[str]
    """Its addresses on the first network."""
    mac: str
    """Its Ethernet address on the first network."""
    ports: Iterable[str]
    """Published ports, ``"[IP:]HOST:GUEST[/udp]"``."""
    allow: Iterable[str]
    """What it may reach, such as ``"*.pypi.org:443"``; nothing else then."""
    deny: Iterable[str]
    """What it may not reach."""
    default: Literal["allow", "deny"] | None
    """What becomes of what no rule is about; ``deny`` when there is an allow rule."""
    dns: Iterable[str]
    """Name servers to ask instead of the host's."""
    hosts: Mapping[str, str]
    """Names to addresses that its network answers."""
    bandwidth: int | str | None
    """Bytes a second each way: a number, or text such as ``"10M"``."""
    hostname: str
    """Its name for itself."""
    entrypoint: Iterable[str]
    """What comes before a command, in place of the image's."""
    kernel: str | Path
    """A kernel's version or image."""
    timeout_s: float
    """The machine's whole life."""
    command_timeout_s: float
    """Each command."""
    idle_timeout_s: float
    """Without any command."""
    boot_timeout_s: float
    """Until it takes commands."""


def memory_mib(text: str | int) -> int:
    """A size of memory in MiB: a number is MiB already; text has ``K``, ``M``, ``G`` or ``T``.

    Raises:
        ConfigError: It is no size.
    """
    if not isinstance(text, str):
        return text
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        message = f"{text!r} is not a size of memory"
        raise ConfigError(message, hint="write it as 512M or 2G")
    return int(float(found[1]) * _MIB[found[2].lower()])


def spec_from(options: MachineOptions) -> MachineSpec:
    """The specification that keywords stand for.

    Raises:
        ConfigError: Keywords contradict one another, or a value isn't possible.
    """
    unknown = sorted(set(options) - MachineOptions.__optional_keys__)
    if unknown:
        import difflib  # noqa: PLC0415 - only for mistakes

        known = sorted(MachineOptions.__optional_keys__)
        near = difflib.get_close_matches(unknown[0], known, n=1)
        message = f"a machine has no option {unknown[0]!r}"
        hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}"
        raise ConfigError(message, hint=hint)
    mounts = options.get("mounts", ())
    values: dict[str, object] = {
        "root": _root(options),
        "mounts": tuple(m if isinstance(m, Mount) else Mount.parse(m) for m in mounts),
        "memory_mib": memory_mib(options.get("memory", 512)),
        "ports": tuple(options.get("ports", ())),
        "dns": tuple(options.get("dns", ())),
        "hosts": dict(options.get("hosts", {})),
        "bandwidth": _bandwidth(options.get("bandwidth")),
        "disk_rate": DiskRate(
            bytes_per_s=_bandwidth(options.get("disk_bandwidth")),
            requests_per_s=options.get("disk_iops"),
        ),
        "env": dict(options.get("env", {})),
        "timeouts": Timeouts(
            machine_s=options.get("timeout_s"),
            command_s=options.get("command_timeout_s"),
            idle_s=options.get("idle_timeout_s"),
            boot_s=options.get("boot_timeout_s", 120.0),
        ),
    }
    if "entrypoint" in options:
        values["entrypoint"] = tuple(options["entrypoint"])
    values |= _network(options)
    plain = ("name", "engine", "vcpus", "workdir", "user", "hostname", "kernel", "huge_pages")
    given = cast("Mapping[str, object]", options)
    values |= {key: given[key] for key in plain if key in given}
    return MachineSpec(**values)  # type: ignore[arg-type]


def _network(options: MachineOptions) -> dict[str, object]:
    given = options.get("network", "user")
    rules = [key for key in ("allow", "deny", "default") if options.get(key) is not None]
    policy = Policy(
        allow=_texts(options.get("allow", ())),
        deny=_texts(options.get("deny", ())),
        default=options.get("default"),
    )
    if isinstance(given, Policy):
        if any(options.get(key) for key in rules):
            message = f"egress rules are given twice: by network and by {rules[0]}"
            raise ConfigError(message)
        policy = given
    first, *others = _networks(given)
    words = [f"ip={address}" for address in _texts(options.get("ip", ()))]
    if options.get("mac"):
        words.append(f"mac={options['mac']}")
    network = ",".join([first, *words])
    return {"network": network, "networks": tuple(others), "policy": policy}


def _networks(given: str | Policy | Iterable[str]) -> list[str]:
    if isinstance(given, Policy):
        return ["user"]
    return [given] if isinstance(given, str) else (list(given) or ["none"])


def _texts(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _bandwidth(given: int | str | None) -> int | None:
    if not isinstance(given, str):
        return given
    found = _SIZE.fullmatch(given.strip())
    if found is None or not float(found[1]):
        message = f"{given!r} is not a number of bytes a second"
        raise ConfigError(message, hint="write it as 500K or 10M")
    factor = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    return int(float(found[1]) * factor[found[2].lower()])


def _root(options: MachineOptions) -> Root:
    given = [key for key in ("image", "root", "disk") if key in options]
    if len(given) > 1:
        message = f"a machine has one root file system, not both {given[0]} and {given[1]}"
        raise ConfigError(message)
    writable = options.get("writable", False)
    if "image" in options:
        return ImageRoot(reference=options["image"])
    if "root" in options:
        return DirectoryRoot(path=Path(options["root"]).expanduser().absolute(), writable=writable)
    if "disk" in options:
        path = Path(options["disk"]).expanduser().absolute()
        disk_format = options.get("disk_format")
        if disk_format is None:
            message = f"the format of the disk image {path} is not said, and it is never guessed"
            raise ConfigError(message, hint="add the format: raw or qcow2")
        if disk_format not in ("raw", "qcow2"):
            message = f"{disk_format!r} is not a format of disk images"
            raise ConfigError(message, hint="raw and qcow2 are known")
        return DiskRoot(
            path=path,
            format=disk_format,
            writable=writable,
            partition=options.get("disk_partition"),
            filesystem=options.get("disk_filesystem", ""),
        )
    said = [key for key in ("disk_format", "disk_partition", "disk_filesystem") if key in options]
    if said:
        message = f"{said[0]} was said, and there is no disk"
        raise ConfigError(message, hint="add --disk FILE")
    if writable:
        message = "the host's own programs can't be made writable"
        raise ConfigError(message, hint="give a directory, a disk or an image as the root")
    return HostRoot()

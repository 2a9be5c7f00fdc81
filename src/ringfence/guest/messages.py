"""What the agent is sent, as JSON objects (docs/reference/agent-protocol.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringfence.guest.frames import Json
    from ringfence.guest.spec import (
        ExecSpec,
        GuestSetup,
        InterfaceSpec,
        MountSpec,
        Privileges,
        RootSpec,
    )

__all__ = ["exec_request", "interface", "setup"]


def setup(spec: GuestSetup, time_ns: int) -> Json:
    """The setup message.

    Args:
        spec: What to set up.
        time_ns: Now, since 1970.
    """
    return {
        "hostname": spec.hostname,
        "time_ns": time_ns,
        "root": _root(spec.root),
        "mounts": [_mount(mount) for mount in spec.mounts],
        "interfaces": [interface(one) for one in spec.interfaces],
        "hosts": dict(spec.hosts),
        "sysctls": dict(spec.sysctls),
        "limits": {name: list(values) for name, values in spec.limits.items()},
    }


def _root(spec: RootSpec) -> Json:
    layers = [
        {
            "kind": layer.kind.value,
            "source": layer.source,
            "filesystem": layer.filesystem,
            "subpath": layer.subpath,
        }
        for layer in spec.layers
    ]
    return {"layers": layers, "writable": spec.writable.value, "upper_mib": spec.upper_mib}


def _mount(spec: MountSpec) -> Json:
    return {
        "type": spec.type.value,
        "target": spec.target,
        "source": spec.source,
        "subpath": spec.subpath,
        "filesystem": spec.filesystem,
        "options": spec.options,
        "read_only": spec.read_only,
    }


def interface(spec: InterfaceSpec) -> Json:
    """A network interface as the agent reads it."""
    return {
        "mac": spec.mac,
        "addresses": list(spec.addresses),
        "gateways": list(spec.gateways),
        "dns": list(spec.dns),
        "search": list(spec.search),
        "mtu": spec.mtu,
        "name": spec.name,
    }


def exec_request(spec: ExecSpec) -> Json:
    """The request to run a command."""
    size = spec.terminal
    return {
        "op": "exec",
        "argv": list(spec.argv),
        "env": dict(spec.env),
        "cwd": spec.cwd,
        "user": spec.user,
        "terminal": None if size is None else {"columns": size.columns, "rows": size.rows},
        "stdin": spec.stdin,
        "timeout_ms": None if spec.timeout_s is None else int(spec.timeout_s * 1000),
        "privileges": None if spec.privileges is None else _privileges(spec.privileges),
    }


def _privileges(wanted: Privileges) -> Json:
    flags, program = wanted.seccomp or (0, "")
    return {
        "groups": wanted.groups,
        "umask": wanted.umask,
        "capabilities": None if wanted.capabilities is None else dict(wanted.capabilities),
        "no_new_privileges": wanted.no_new_privileges,
        "limits": wanted.limits,
        "oom_score_adj": wanted.oom_score_adj,
        "seccomp": {"flags": flags, "program": program} if wanted.seccomp else None,
    }

"""list, ps, features, spec."""

from __future__ import annotations

import json
import os
import sys

from ringfence.container import capabilities, flags, seccomp
from ringfence.container.oci.options import parse
from ringfence.container.oci.template import template
from ringfence.container.state import State, default_root
from ringfence.errors import ConfigError, ConflictError, NotFoundError, RingfenceError

__all__ = ["features_command", "list_command", "ps_command", "spec_command"]

# As runc's list has them, in its order.
_LISTED = (
    "ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner",
)  # fmt: skip
_VERSIONS = ("1.0.0", "1.2.0")


def _owner(path: str) -> str:
    import pwd

    uid = os.stat(path).st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def _states(root: str) -> list[State]:
    found = []
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        try:
            found.append(State.load(root, name))
        except RingfenceError:
            continue  # it is being made or removed at this moment
    return found


def list_command(root: str, words: list[str]) -> int:
    """Prints all containers."""
    arguments = parse(words, "format/f", "quiet/q")
    if root != default_root() and not os.path.isdir(root):
        message = f"there is no directory of states {root}"
        raise NotFoundError(message)
    rows = [
        {
            **state.document(),
            "rootfs": state.rootfs,
            "created": state.created,
            "owner": _owner(state.directory),
        }
        for state in _states(root)
    ]
    if "quiet" in arguments:
        sys.stdout.writelines(f"{row['id']}\n" for row in rows)
        return 0
    if arguments.text("format", "table") == "json":
        rows = [{name: row[name] for name in _LISTED} for row in rows]
        sys.stdout.write(json.dumps(rows or None, separators=(",", ":")) + "\n")
        return 0
    columns = ("id", "pid", "status", "bundle", "created", "owner")
    table = [tuple(name.upper() for name in columns)]
    table += [tuple(str(row[name]) for name in columns) for row in rows]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("   ".join(cells).rstrip() + "\n")
    return 0


def ps_command(root: str, words: list[str]) -> int:
    """Prints a container's processes, by the host's ps or as JSON."""
    arguments = parse(words, "format/f", "", ordered=True)
    if not arguments.rest:
        message = "a container ID is wanted"
        raise ConfigError(message)
    state = State.load(root, arguments.rest[0])
    pids = state.group.processes() if state.group is not None else [state.pid]
    if arguments.text("format", "table") == "json":
        sys.stdout.write(json.dumps(pids) + "\n")
        return 0
    import subprocess

    wanted = arguments.rest[1:] or ["-ef"]
    output = subprocess.run(["ps", *wanted], capture_output=True, text=True, check=True).stdout
    head, *lines = output.splitlines()
    column = head.split().index("PID")
    known = {str(pid) for pid in pids}
    sys.stdout.write(head + "\n")
    for line in lines:
        if line.split()[column] in known:
            sys.stdout.write(line + "\n")
    return 0


def features_command(_root: str, _words: list[str]) -> int:
    """Prints what this runtime knows, as the specification's features document."""
    from ringfence.container.cgroups import systemd

    has_systemd = systemd.is_running()
    hooks = [
        "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop",
    ]  # fmt: skip
    options = sorted({*flags.FILESYSTEM_FLAGS, *flags.PROPAGATION, "bind", "rbind", "tmpcopyup"})
    document = {
        "ociVersionMin": _VERSIONS[0],
        "ociVersionMax": _VERSIONS[1],
        "hooks": hooks,
        "mountOptions": options,
        "linux": {
            "namespaces": sorted(flags.NAMESPACES),
            "capabilities": list(capabilities.NAMES),
            "cgroup": {"v1": True, "v2": True, "systemd": has_systemd, "systemdUser": has_systemd},
            "seccomp": {
                "enabled": True,
                "actions": sorted(seccomp.ACTIONS),
                "operators": list(seccomp.OPERATORS),
                "archs": sorted(seccomp.ARCHITECTURES),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "netDevices": {"enabled": True},
        },
    }
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0


def spec_command(_root: str, words: list[str]) -> int:
    """Writes a configuration to start from."""
    arguments = parse(words, "bundle/b", "rootless")
    path = os.path.join(arguments.text("bundle", "."), "config.json")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(template(rootless="rootless" in arguments), indent="\t") + "\n")
    except FileExistsError as error:
        message = f"File {path} exists. Remove it first"
        raise ConflictError(message) from error
    return 0

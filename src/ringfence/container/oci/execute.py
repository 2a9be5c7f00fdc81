"""exec: a further process in a container."""

from __future__ import annotations

import os

from ringfence.container import container, flags, lean_json
from ringfence.container.cgroups.group import Group
from ringfence.container.fields import Fields
from ringfence.container.identity import Maps
from ringfence.container.launch import Launch
from ringfence.container.oci.lifecycle import preserved
from ringfence.container.oci.options import Arguments, parse
from ringfence.container.spec import compile_process
from ringfence.container.state import State
from ringfence.errors import ConfigError, NotFoundError, StateError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.launch import Plan

__all__ = ["exec_command"]

_VALUED = (
    "console-socket pidfd-socket cwd env/e user/u additional-gids/g process/p pid-file "
    "process-label apparmor cap/c preserve-fds cgroup"
)
_SWITCHES = "tty/t detach/d no-new-privs ignore-paused"


def _process(arguments: Arguments, config: Fields) -> Fields:
    """The process to run: a file's, or the container's own with what the options change."""
    path = arguments.text("process")
    if path:
        with open(path, "rb") as file:
            return Fields(lean_json.loads(file.read(), path), "process")
    values = dict(config.table("process").values)
    words = arguments.rest[1:]
    if not words:
        message = "a command to run in the container is wanted"
        raise ConfigError(message)
    values["args"], values["terminal"] = words, "tty" in arguments
    environment = values.get("env")
    values["env"] = [
        *(environment if isinstance(environment, list) else []),
        *arguments.texts("env"),
    ]
    if arguments.text("cwd"):
        values["cwd"] = arguments.text("cwd")
    user = dict(config.table("process").table("user").values)
    if arguments.text("user"):
        uid, _, gid = arguments.text("user").partition(":")
        user.update(uid=_number(uid), gid=_number(gid or "0"))
    if arguments.texts("additional-gids"):
        user["additionalGids"] = [_number(text) for text in arguments.texts("additional-gids")]
    values["user"] = user
    values.update(_privileges(arguments, config.table("process").table("capabilities")))
    return Fields(values, "process")


def _privileges(arguments: Arguments, capabilities: Fields) -> dict[str, object]:
    changed: dict[str, object] = {}
    added = arguments.texts("cap")
    if added:
        sets = {}
        for name in ("bounding", "effective", "permitted", "inheritable", "ambient"):
            more = added if name != "inheritable" or name in capabilities else []
            sets[name] = [*capabilities.texts(name), *more]
        changed["capabilities"] = sets
    if "no-new-privs" in arguments:
        changed["noNewPrivileges"] = True
    for option, field in (("apparmor", "apparmorProfile"), ("process-label", "selinuxLabel")):
        if arguments.text(option):
            changed[field] = arguments.text(option)
    return changed


def _number(text: str) -> int:
    if not text.isdigit():
        message = f"a user or group is a number here, not {text!r}"
        raise ConfigError(message)
    return int(text)


def differing_namespaces(pid: int) -> int:
    """``CLONE_NEW*`` flags of the namespaces in which a process isn't with this one."""
    kinds = 0
    for kind, file in flags.NAMESPACE_FILES.items():
        try:
            theirs = os.readlink(f"/proc/{pid}/ns/{file}")
            if theirs != os.readlink(f"/proc/self/ns/{file}"):
                kinds |= flags.NAMESPACES[kind]
        except FileNotFoundError:
            continue
    return kinds


def _below(group: Group, wanted: list[str]) -> Group:
    """The cgroups that a process enters: ``[CONTROLLERS:]PATH``, below the container's own."""
    chosen: dict[str, str] = {}
    for text in wanted:
        controllers, colon, path = text.rpartition(":")
        if ".." in path.split("/"):
            message = f"bad sub cgroup path: {path}"
            raise ConfigError(message)
        known = {name for own, _path, _version in group.directories for name in own} | {""}
        for name in controllers.split(",") if colon else [""]:
            if name not in known:
                message = f"unknown controller {name} in --cgroup {text}"
                raise ConfigError(message)
            chosen[name] = path.strip("/")
    directories = []
    for names, path, version in group.directories:
        inner = next((chosen[name] for name in names if name in chosen), chosen.get("", ""))
        place = f"{path}/{inner}" if inner else path
        if not os.path.isdir(place):
            message = f"error adding pid to cgroups: {place}: no such file or directory"
            raise NotFoundError(message)
        directories.append((names, place, version))
    return Group(directories, rootless=group.rootless)


def _plan(state: State, process: Fields, config: Fields, cgroups: list[str]) -> Plan:
    linux = config.table("linux")
    kinds = differing_namespaces(state.pid)
    user = bool(kinds & flags.NAMESPACES["user"])
    maps = Maps.of(linux)
    sets_groups = not user or not maps.groups or maps.sets_groups
    group = state.group or Group([])
    group = _below(group, cgroups)
    return {
        "join_process": {"pid": state.pid, "kinds": kinds},
        "become_root": user and (maps.has_root or not maps.users),
        "process": compile_process(process, linux, sets_groups=sets_groups),
        **group.entrance(),
    }


def exec_command(root: str, words: list[str]) -> int:
    """Runs a process in a running container."""
    arguments = parse(words, _VALUED, _SWITCHES, ordered=True)
    if not arguments.rest:
        message = "a container ID is wanted"
        raise ConfigError(message)
    state = State.load(root, arguments.rest[0])
    status = state.status
    if status == "stopped":
        message = "cannot exec in a stopped container"
        raise StateError(message)
    if status == "paused" and "ignore-paused" not in arguments:
        message = "cannot exec in a paused container (use --ignore-paused to override)"
        raise StateError(message)
    config = state.config()
    process = _process(arguments, config)
    if state.machine:
        return _in_machine(arguments, state, process)
    plan = _plan(state, process, config, arguments.texts("cgroup"))

    detach, wants_terminal = "detach" in arguments, process.flag("terminal")
    socket = arguments.text("console-socket")
    if wants_terminal and (detach or socket):
        if not socket:
            message = "a detached process with a terminal needs --console-socket"
            raise ConfigError(message)
        from ringfence.container import terminal

        return _run(state, arguments, plan, process, terminal.connect(socket))
    if wants_terminal:
        from ringfence.container import terminal

        def start(console: int) -> tuple[State, Launch]:
            return state, _launch(state, arguments, plan, process, console, copied=True)

        return terminal.run_attached(start, lambda _state: None)
    return _run(state, arguments, plan, process, -1)


def _in_machine(arguments: Arguments, state: State, process: Fields) -> int:
    from ringfence.container.oci_vm import runtime

    socket, detach = arguments.text("console-socket"), "detach" in arguments
    console = -1
    if process.flag("terminal"):
        from ringfence.container import terminal

        if not socket and detach:
            message = "a detached process with a terminal needs --console-socket"
            raise ConfigError(message)
        if not socket:
            return terminal.run_attached(
                lambda number: (state, runtime.stand_in(state, process, number)), lambda _s: None
            )
        console = terminal.connect(socket)
    if preserved(arguments):
        message = "--preserve-fds: a program in a virtual machine can't have the host's descriptors"
        raise UnsupportedError(message)
    return runtime.execute(
        state, process, console, detach=detach, pid_file=arguments.text("pid-file")
    )


def _launch(
    state: State,
    arguments: Arguments,
    plan: Plan,
    process: Fields,
    console: int,
    *,
    copied: bool = False,
) -> Launch:
    inherit = preserved(arguments)
    plan["keep_descriptors"] = list(inherit)
    if console >= 0:
        size = process.table("consoleSize")
        plan["console"] = {
            "socket": console,
            "rows": size.integer("height"),
            "columns": size.integer("width"),
            "copied": copied,
        }
        inherit.append(console)
    plan["ask_register"] = bool(arguments.text("pid-file"))
    launch = Launch(inherit)
    launch.give(plan)

    def register() -> str:
        container.write_pid_file(arguments.text("pid-file"), launch.pid)
        return ""

    def give_listener() -> str:
        from ringfence.container import listener

        profile = state.config().table("linux").table("seccomp")
        listener.tell(profile, state, launch.pid, int(launch.argument))
        return ""

    launch.follow({"register": register, "listener": give_listener})
    if arguments.text("pidfd-socket"):
        container.send_pidfd(arguments.text("pidfd-socket"), launch.pid)
    return launch


def _run(state: State, arguments: Arguments, plan: Plan, process: Fields, console: int) -> int:
    from ringfence.container import waiting

    with waiting.Signals() as signals:
        launch = _launch(state, arguments, plan, process, console)
        launch.close()
        return 0 if "detach" in arguments else signals.wait(launch.pid)

"""A container of the runtime specification: created, started, ended, removed."""

from __future__ import annotations

import os
import time

from ringfence.container import hooks, lean_json
from ringfence.container.cgroups import devices
from ringfence.container.cgroups.group import Group
from ringfence.container.identity import Maps
from ringfence.container.launch import Launch
from ringfence.container.state import State, process_start
from ringfence.errors import ConflictError, HostError, RingfenceError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.cgroups.systemd import Scope
    from ringfence.container.fields import Fields
    from ringfence.container.spec import Bundle

# With this annotation "true", a small process 1 reaps orphans and passes signals on to the program.
REAPER = "org.ringfence.reaper"

# What runs the bundle: "container", or "vm" and engines of virtual machines.
ENGINE = "org.ringfence.engine"

__all__ = [
    "ENGINE",
    "REAPER",
    "CreateOptions",
    "create",
    "destroy",
    "now",
    "start",
    "take_group",
    "write_pid_file",
]


class CreateOptions:
    """How a container is created, beyond its bundle.

    Args:
        wait_for_start: Whether the program waits for :func:`start`.
        console: A connected socket that gets the terminal, or -1.
        systemd: systemd gives the control groups out.
        copied: The terminal is copied to the caller's own.
        engine: What is to run it; empty for a container of the host's kernel.
        keep: Descriptors that the program keeps.
        no_pivot: Change the root without pivot_root, for hosts that run from an initramfs.
        no_keyring: Stay in the caller's session keyring.
        pid_file: Where the process's number is written.
        pidfd_socket: A socket's path, which gets a descriptor of the process.
    """

    __slots__ = (
        "console",
        "copied",
        "engine",
        "keep",
        "no_keyring",
        "no_pivot",
        "pid_file",
        "pidfd_socket",
        "scope",
        "systemd",
        "wait_for_start",
    )

    def __init__(self, *, wait_for_start: bool = True) -> None:
        self.wait_for_start = wait_for_start
        self.console = -1
        self.keep: list[int] = []
        self.no_pivot = self.no_keyring = self.copied = self.systemd = False
        self.scope: Scope | None = None
        self.pid_file = self.pidfd_socket = self.engine = ""


def now() -> str:
    """The time as RFC 3339 has it."""
    stamp = time.time_ns()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stamp // 10**9))
    return f"{seconds}.{stamp % 10**9:09}Z"


def _group(bundle: Bundle, name: str) -> Group:
    path = bundle.linux.text("cgroupsPath") or name
    rootless = os.geteuid() != 0 or bundle.makes_users
    return Group.plan(path, rootless=rootless)


def create(bundle: Bundle, root: str, name: str, options: CreateOptions) -> tuple[State, Launch]:
    """Sets a container up, to the point where its program runs or waits to be started.

    Raises:
        ConflictError: There is a container of that ID.
        HostError: A step failed; nothing is left.
    """
    state = State.make(root, name)
    launch: Launch | None = None
    try:
        state.bundle, state.rootfs, state.created = bundle.path, bundle.rootfs, now()
        state.annotations = bundle.config.mapping("annotations")
        state.save_config(f"{bundle.path}/config.json")
        if "mount" not in bundle.namespaces:
            from ringfence.container import shared_mounts

            shared_mounts.remember(state.directory, bundle.rootfs)
        state.group = take_group(bundle, name, options)
        launch = _launch(bundle, state, options)
        _follow(bundle, state, launch, options)
    except BaseException:
        if launch is not None:
            launch.reap()
            launch.close()
        destroy(state)
        raise
    finally:
        if options.scope is not None:
            options.scope.release()
    return state, launch


def take_group(bundle: Bundle, name: str, options: CreateOptions) -> Group:
    """The container's group. One that others are in isn't its own to limit, empty and remove.

    Raises:
        ConflictError: Others are in it, or it is frozen.
        HostError: systemd doesn't give it.
    """
    if options.systemd:
        from ringfence.container.cgroups.systemd import Scope

        options.scope = Scope(bundle.linux.text("cgroupsPath"), name)
        group = Group.plan(options.scope.path, rootless=os.geteuid() != 0)
    else:
        group = _group(bundle, name)
    strangers = group.processes()
    if strangers:
        message = f"container's cgroup is not empty: {len(strangers)} process(es) found"
        raise ConflictError(message, hint="give it a cgroupsPath of its own")
    if group.frozen():
        # The container would stop in the midst of its setup, and its maker with it.
        message = "container's cgroup unexpectedly frozen"
        raise ConflictError(message, hint="thaw it, or give the container a cgroupsPath of its own")
    if options.scope is not None:
        options.scope.start(bundle.linux.table("resources"))
    return group


def _prepare_group(bundle: Bundle, group: Group) -> dict[str, object]:
    resources = bundle.linux.table("resources")
    group.make()
    group.limit(resources)
    return devices.apply(group, devices.rules(resources))


def _trees(plan: dict[str, object], bundle: Bundle) -> list[int]:
    """Mounts that the runtime makes itself; most containers have none."""
    if "user" not in bundle.namespaces and not bundle.has_id_maps:
        return []
    from ringfence.container import sources

    return sources.open_trees(plan, bundle)


def _launch(bundle: Bundle, state: State, options: CreateOptions) -> Launch:
    group = state.group or Group([])
    device_rules = _prepare_group(bundle, group)
    plan = bundle.plan(group)
    trees = _trees(plan, bundle)
    plan.update(device_rules)
    root = plan["root"]
    inherit = [*options.keep, *trees]
    fifo = -1
    if isinstance(root, dict):
        root["no_pivot"] = options.no_pivot
        root["create_hooks"] = hooks.inside(bundle.config, "createContainer")
        root["ask_hooks"] = bool(bundle.config.table("hooks").values)
    plan["start_hooks"] = hooks.inside(bundle.config, "startContainer")
    plan["keep_descriptors"] = options.keep
    plan["ask_register"] = True
    plan["reaper"] = state.annotations.get(REAPER) == "true"
    plan.update(group.entrance())
    if not options.no_keyring:
        plan["keyring"] = f"_ses.{state.name}"
    if options.console >= 0:
        size = bundle.process.table("consoleSize")
        plan["console"] = {
            "socket": options.console,
            "rows": size.integer("height"),
            "columns": size.integer("width"),
            "mount": True,
            "copied": options.copied,
        }
        inherit.append(options.console)
    try:
        if options.wait_for_start:
            os.mkfifo(state.fifo)
            # Any user that the program is may open it for writing.
            os.chmod(state.fifo, 0o622)  # noqa: S103 - its directory is the runtime's
            fifo = os.open(state.fifo, os.O_PATH | os.O_CLOEXEC)
            inherit.append(fifo)
            plan["start_fifo"] = fifo
        launch = Launch(inherit)
    finally:
        for number in trees if fifo < 0 else (*trees, fifo):
            os.close(number)
    launch.give(plan)
    return launch


def _follow(bundle: Bundle, state: State, launch: Launch, options: CreateOptions) -> None:
    def write_maps() -> str:
        Maps.of(bundle.linux).write(launch.stage)
        return ""

    def register() -> str:
        state.pid = launch.pid
        state.start = process_start(launch.pid)[1]
        state.save()
        if "netDevices" in bundle.linux:
            from ringfence.container import net_devices

            net_devices.move(bundle.linux, launch.pid)
        return ""

    def run_hooks() -> str:
        document = state.document("creating")
        for kind in ("prestart", "createRuntime"):
            hooks.run(bundle.config, kind, document)
        return lean_json.dumps(document)

    def give_listener() -> str:
        from ringfence.container import listener

        listener.tell(bundle.linux.table("seccomp"), state, launch.pid, int(launch.argument))
        return ""

    answers = {
        "map": write_maps, "register": register, "hooks": run_hooks, "listener": give_listener,
    }  # fmt: skip
    launch.follow(answers, until="ready" if options.wait_for_start else "")
    if options.pidfd_socket:
        send_pidfd(options.pidfd_socket, state.pid)
    if options.pid_file:
        write_pid_file(options.pid_file, state.pid)


def write_pid_file(path: str, pid: int) -> None:
    """Writes a process's number, whole or not at all: others wait for the file."""
    folder, name = os.path.split(path)
    new = f"{folder or '.'}/.{name}"
    with open(new, "w", encoding="ascii") as file:
        file.write(str(pid))
    os.replace(new, path)


def send_pidfd(path: str, pid: int) -> None:
    """Sends a descriptor of a process to whoever listens on a socket.

    Raises:
        HostError: Nobody does.
    """
    import socket

    handle = os.pidfd_open(pid)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            socket.send_fds(connection, [b"pidfd"], [handle])
    except OSError as error:
        message = f"cannot send the process to the socket {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=path) from error
    finally:
        os.close(handle)


def start(state: State) -> None:
    """Lets a created container's program run.

    Raises:
        StateError: It isn't waiting.
        HostError: It ended before it could be started.
    """
    status = state.status
    if status == "stopped":
        message = "cannot start a container that has stopped"
        raise StateError(message)
    if status != "created":
        message = f"cannot start an already {status} container"
        raise StateError(message)
    # An engine watches for what the program does once this process has ended: nothing that can be done
    # before is left for between.
    config = state.config()
    _open_gate(state)
    os.unlink(state.fifo)
    if config.table("hooks").values:
        hooks.run(config, "poststart", state.document("running"))


def _open_gate(state: State) -> None:
    import select

    gate = os.open(state.fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        poll = select.poll()
        poll.register(gate, select.POLLIN)
        while True:
            if any(event & select.POLLIN for _number, event in poll.poll(100)):
                os.read(gate, 1)
                return
            if not state.alive:
                message = "the container's process ended before it was started"
                raise HostError(message)
    finally:
        os.close(gate)


def destroy(state: State) -> None:
    """Ends what is left of a container and removes all that was made for it."""
    group = state.group
    if group is not None:
        if group.processes():
            group.kill()
        group.remove()
    config = None
    if os.path.exists(f"{state.directory}/config.json") and state.pid:
        config = state.config()
    if os.path.exists(f"{state.directory}/mounts"):
        from ringfence.container import shared_mounts

        shared_mounts.take_away(state.directory, state.rootfs)
    state.remove()
    if state.machine:
        from ringfence.machine.state import list_machines

        # Looking for machines clears what one that was killed has left.
        list_machines()
    if config is not None and config.table("hooks").values:
        _last_hooks(config, state)


def _last_hooks(config: Fields, state: State) -> None:
    try:
        hooks.run(config, "poststop", state.document("stopped"))
    except RingfenceError as error:
        # The specification: a failing poststop hook is logged, and the rest goes on.
        os.write(2, f"{error}\n".encode())

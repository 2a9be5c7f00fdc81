"""create, start, run, state, kill, delete."""

from __future__ import annotations

import os
import sys

from ringfence.container import container
from ringfence.container.oci.options import Arguments, parse
from ringfence.container.spec import Bundle
from ringfence.container.state import State, check_id
from ringfence.errors import ConfigError, HostError, NotFoundError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.launch import Launch
    from ringfence.container.oci_vm.runtime import Monitor

    Launched = Launch | Monitor

__all__ = [
    "create_command",
    "delete_command",
    "kill_command",
    "run_command",
    "start_command",
    "state_command",
]

_CREATE = (
    "bundle/b console-socket engine pidfd-socket pid-file preserve-fds",
    "no-pivot no-new-keyring systemd-cgroup",
)
_RUN_SWITCHES = f"{_CREATE[1]} detach/d keep no-subreaper"


def _options(words: Arguments, bundle: Bundle, *, wait_for_start: bool) -> container.CreateOptions:
    options = container.CreateOptions(wait_for_start=wait_for_start)
    options.pid_file = words.text("pid-file")
    options.systemd = "systemd-cgroup" in words
    options.pidfd_socket = words.text("pidfd-socket")
    options.no_pivot = "no-pivot" in words
    options.no_keyring = "no-new-keyring" in words
    options.keep = preserved(words)
    options.engine = words.text("engine") or bundle.config.mapping("annotations").get(
        container.ENGINE, ""
    )
    return options


def _create(
    bundle: Bundle, root: str, name: str, options: container.CreateOptions
) -> tuple[State, Launched]:
    if options.engine in {"", "container"}:
        return container.create(bundle, root, name, options)
    from ringfence.container.oci_vm import bundle as bundles
    from ringfence.container.oci_vm import runtime

    return runtime.create(bundle, root, name, options, bundles.engine_of(options.engine))


def preserved(words: Arguments) -> list[int]:
    """Descriptors that the program keeps: those asked for, and a service manager's sockets."""
    count = words.integer("preserve-fds") + int(os.environ.get("LISTEN_FDS", "0") or 0)
    numbers = list(range(3, 3 + count))
    for number in numbers:
        try:
            os.fstat(number)
        except OSError as error:
            message = f"--preserve-fds: descriptor {number} isn't open"
            raise ConfigError(message) from error
    return numbers


def create_command(root: str, words: list[str]) -> int:
    """Sets a container up; its program waits for start."""
    arguments = parse(words, *_CREATE)
    name = check_id(arguments.only_id())
    bundle = Bundle(arguments.text("bundle", "."))
    options = _options(arguments, bundle, wait_for_start=True)
    socket = arguments.text("console-socket")
    if bundle.terminal != bool(socket):
        message = (
            "cannot allocate tty if runc will detach without setting console socket"
            if bundle.terminal
            else "cannot use console socket if runc will not detach or allocate tty"
        )
        raise ConfigError(message)
    if socket:
        from ringfence.container import terminal

        options.console = terminal.connect(socket)
    _state, launch = _create(bundle, root, name, options)
    launch.close()
    return 0


def start_command(root: str, words: list[str]) -> int:
    """Lets a created container's program run."""
    container.start(State.load(root, parse(words, "", "").only_id()))
    return 0


def run_command(root: str, words: list[str]) -> int:
    """Creates a container, runs it, and removes it when it ends."""
    arguments = parse(words, _CREATE[0], _RUN_SWITCHES)
    name = check_id(arguments.only_id())
    bundle = Bundle(arguments.text("bundle", "."))
    options = _options(arguments, bundle, wait_for_start=False)
    socket, detach = arguments.text("console-socket"), "detach" in arguments
    if bundle.terminal and (detach or socket):
        if not (detach and socket):
            message = (
                "a detached container with a terminal needs --console-socket, and no other does"
            )
            raise ConfigError(message)
        from ringfence.container import terminal

        options.console = terminal.connect(socket)
    elif bundle.terminal:
        from ringfence.container import terminal

        return terminal.run_attached(
            lambda console: _run(bundle, root, name, options, console),
            (lambda _state: None) if "keep" in arguments else container.destroy,
        )
    if detach:
        state, launch = _create(bundle, root, name, options)
        _started(bundle, state)
        launch.close()
        return 0
    return _run_foreground(bundle, root, name, options, keep="keep" in arguments)


def _run(
    bundle: Bundle, root: str, name: str, options: container.CreateOptions, console: int
) -> tuple[State, Launched]:
    options.console, options.copied = console, True
    state, launch = _create(bundle, root, name, options)
    _started(bundle, state)
    return state, launch


def _started(bundle: Bundle, state: State) -> None:
    if bundle.config.table("hooks").values:
        from ringfence.container import hooks

        hooks.run(bundle.config, "poststart", state.document("running"))


def _run_foreground(
    bundle: Bundle, root: str, name: str, options: container.CreateOptions, *, keep: bool
) -> int:
    from ringfence.container import waiting

    with waiting.Signals() as signals:
        state, launch = _create(bundle, root, name, options)
        try:
            _started(bundle, state)
            status = signals.wait(launch.pid)
        finally:
            launch.close()
            if not keep:
                container.destroy(state)
    return status


def state_command(root: str, words: list[str]) -> int:
    """Prints a container's state."""
    import json

    state = State.load(root, parse(words, "", "").only_id())
    document = state.document()
    document["rootfs"], document["created"], document["owner"] = state.rootfs, state.created, ""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0


def _signal(text: str) -> int:
    if text.isdigit():
        return int(text)
    import signal

    try:
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"].value
    except KeyError as error:
        message = f"there is no signal {text!r}"
        raise ConfigError(message) from error


_NUMBERS = {"KILL": 9, "TERM": 15, "INT": 2, "HUP": 1, "QUIT": 3, "USR1": 10, "USR2": 12}


def kill_command(root: str, words: list[str]) -> int:
    """Sends the container's process a signal."""
    arguments = parse(words, "signal/s", "all/a force/f")
    if not 1 <= len(arguments.rest) <= 2:
        message = "a container ID and at most a signal are wanted"
        raise ConfigError(message)
    state = State.load(root, arguments.rest[0])
    text = arguments.rest[1] if len(arguments.rest) == 2 else arguments.text("signal", "TERM")
    number = _NUMBERS.get(text.upper().removeprefix("SIG")) or _signal(text)
    # A machine's other processes run it: signals are for its program.
    if "all" in arguments and state.group is not None and not state.machine:
        state.group.kill(number)
        return 0
    _kill(state, number)
    return 0


def _kill(state: State, number: int) -> None:
    if not state.alive and number == 9 and state.group is not None and state.group.processes():
        # The first has ended, and others that shared the host's processes with it haven't.
        state.group.kill()
        return
    if not state.alive:
        # In runc's words, which engines look for.
        message = "container not running"
        raise StateError(message)
    try:
        # Asked before it ends, and its place in /proc with it.
        shared = os.path.samefile(f"/proc/{state.pid}/ns/pid", "/proc/self/ns/pid")
        os.kill(state.pid, number)
    except (FileNotFoundError, ProcessLookupError) as error:
        message = "container not running"
        raise StateError(message) from error
    if number != 9 or state.group is None:
        return
    if shared:
        # Without a namespace of their own, the others don't end with the first.
        state.group.kill()
    if state.group.frozen():
        state.group.freeze(frozen=False)


def delete_command(root: str, words: list[str]) -> int:
    """Removes a container that has ended; with --force, ends it first."""
    arguments = parse(words, "", "force/f")
    name = arguments.only_id()
    force = "force" in arguments
    try:
        state = State.load(root, name)
    except NotFoundError:
        folder = State(root, name)
        if force:
            # What a start that was killed half-way has left.
            folder.remove()
            return 0
        raise
    status = state.status
    if status in {"running", "paused"} and not force:
        message = f"cannot delete container {name} that is not stopped: {status}"
        raise StateError(message)
    if status != "stopped":
        _end(state)
    container.destroy(state)
    return 0


def _end(state: State) -> None:
    from time import sleep

    if state.group is not None:
        state.group.kill()
    for attempt in range(200):
        try:
            os.kill(state.pid, 9)
        except ProcessLookupError:
            return
        if not state.alive:
            return
        sleep(min(0.001 * 2**attempt, 0.05))
    message = f"the process {state.pid} of {state.name} doesn't end"
    raise HostError(message)

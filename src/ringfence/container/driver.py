"""Machines as containers: the host's kernel, namespaces of their own, the same agent as in a VM.

The agent is the container's first process. It serves a socket that the host made and that has no
path inside, so that commands, files and streams are the same as those of virtual machines.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from ringfence import _binaries
from ringfence.container import (
    capabilities,
    default_profile,
    host_tree,
    init_program,
    machine_group,
)
from ringfence.container.agent import ContainedAgent
from ringfence.container.cgroups import stats
from ringfence.container.cgroups.view import mount_table
from ringfence.container.file_limit import file_limit
from ringfence.container.identity import Maps, own_maps
from ringfence.container.machine_setup import Setup, spawn
from ringfence.container.oci import template
from ringfence.container.spec import device_links, device_nodes
from ringfence.errors import StateError, UnsupportedError
from ringfence.machine import check, sockets
from ringfence.machine.driver import Ending, RunningInfo
from ringfence.machine.network_plan import Attachments, describe, tell_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.container.cgroups.group import Group
    from ringfence.container.launch import Plan
    from ringfence.guest.agent import Agent
    from ringfence.machine.driver import AgentLike, Driver, Place
    from ringfence.machine.phases import Phases
    from ringfence.machine.spec import MachineSpec
    from ringfence.network import LinkSpec

__all__ = ["ContainerDriver", "ContainerMachine", "driver"]

_SOCKET = "agent"
# CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET: those that hold nothing of the host's.
_EARLY = 0x0400_0000 | 0x0800_0000 | 0x4000_0000
_KINDS = ("mount", "pid", "network", "uts", "ipc", "cgroup")
_NOBODY_S = 10.0


def driver() -> Driver:
    """The driver of the engine ``container``."""
    return ContainerDriver()


class ContainerDriver:
    """Starts containers."""

    def start(self, spec: MachineSpec, place: Place, phases: Phases) -> ContainerMachine:
        """Starts a container and waits until its agent runs.

        Raises:
            RingfenceError: See :meth:`ringfence.machine.driver.Driver.start`.
        """
        with phases.measure("check"):
            check.check_container(spec)
            check.check_host(spec)
        with ExitStack() as stack, phases.measure("container"):
            machine = _launch(spec, place, phases, stack)
            machine.own(stack.pop_all())
        return machine

    def attach(self, place: Place) -> AgentLike:
        """Reaches a container that another process started.

        Raises:
            StateError: It doesn't answer.
        """
        path = place.sockets / _SOCKET
        if not path.exists():
            message = f"the machine {place.name} is not running"
            raise StateError(message, hint=f"ringfence inspect {place.name} says how it ended")
        group = machine_group.of_running(place)
        return ContainedAgent(lambda: sockets.connect(path), group)

    def clear(self, place: Place) -> None:
        """Ends and removes what a holder that died left of a container.

        Raises:
            HostError: Processes stay.
        """
        machine_group.remove(machine_group.of_running(place))
        host_tree.remove_copy(place)


class ContainerMachine:
    """A machine in a container.

    Args:
        setup: Of its first process, a child of this one.
        agent: Runs commands in it.
        group: Its control groups.
        place: Where its files are.
        attachments: Its networks.
    """

    def __init__(
        self, setup: Setup, agent: Agent, group: Group, place: Place, attachments: Attachments
    ) -> None:
        self._setup = setup
        self._pid = setup.launch.pid
        self._attachments = attachments
        self._handle = os.pidfd_open(self._pid)
        self._agent = agent
        self._group = group
        self._place = place
        self._resources = ExitStack()
        self._lock = threading.Lock()
        self._killed = False
        self._ending: Ending | None = None

    def own(self, resources: ExitStack) -> None:
        """Takes over what is to be let go of with it."""
        self._resources = resources

    @property
    def agent(self) -> AgentLike:
        """Runs commands in it."""
        return self._agent

    @property
    def info(self) -> RunningInfo:
        """What is known of it."""
        return RunningInfo(engine="container", pid=self._pid, kernel=os.uname().release)

    def await_ready(self) -> None:
        """Waits until its first process is the agent.

        Raises:
            HostError: A step of its setup failed.
        """
        try:
            self._setup.follow()
        except BaseException as error:
            self._setup.launch.reap()
            self._ending = Ending(reason="failed", message=str(error))
            raise

    def balloon(self, target_mib: int) -> None:
        """Containers have no balloon."""
        message = f"a container's memory is the host's: it can't give {target_mib} MiB back"
        raise UnsupportedError(message, hint="use --engine auto")

    def pause(self) -> None:
        """Stops every process where it is."""
        self._group.freeze(frozen=True)

    def resume(self) -> None:
        """Lets them go on."""
        self._group.freeze(frozen=False)

    def kill(self) -> None:
        """Ends it at once, with all that runs in it."""
        with self._lock:
            if self._ending is not None:
                return
            self._killed = True
            with suppress(ProcessLookupError):
                # The kernel kills what is in the namespace with its first process.
                os.kill(self._pid, 9)
            if self._group.frozen():
                self._group.freeze(frozen=False)

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        """How it ended; None when it still runs after that time."""
        if self._ending is not None:
            return self._ending
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        if not poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000))):
            return None
        with self._lock:
            if self._ending is None:
                self._ending = self._end_of(os.waitpid(self._pid, 0)[1])
        return self._ending

    def _end_of(self, status: int) -> Ending:
        code = os.waitstatus_to_exitcode(status)
        if self._killed:
            return Ending(reason="killed", message="it was killed")
        if code == 0:
            return Ending(reason="poweroff", message="the container turned itself off")
        if stats.oom_kills(self._group):
            message = "the container ran out of memory, and the kernel killed its agent"
            return Ending(reason="crash", message=message, detail=self._last_words())
        how = f"signal {-code}" if code < 0 else f"status {code}"
        message = f"the container's agent ended by {how}"
        return Ending(reason="crash", message=message, detail=self._last_words())

    def _last_words(self) -> str:
        with suppress(OSError):
            return (self._place.folder / "console.log").read_text(errors="replace")[-4096:]
        return ""

    def stats(self, *, engine_counters: bool = False) -> Mapping[str, object]:  # noqa: ARG002 - has none
        """What its control groups count."""
        found = stats.collect(self._group)
        return {"state": self._state(), **found, "oom_kills": stats.oom_kills(self._group)}

    def _state(self) -> str:
        if self._ending is not None:
            return "ended"
        return "paused" if self._group.frozen() else "running"

    def inspect(self) -> Mapping[str, object]:
        """What it is made of."""
        return {
            "state": self._state(),
            "pid": self._pid,
            "namespaces": {
                name: os.readlink(f"/proc/{self._pid}/ns/{name}")
                for name in os.listdir(f"/proc/{self._pid}/ns")
            },
            "cgroups": [path for _names, path, _version in self._group.directories],
            "networks": self._attachments.describe(),
        }

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that it is on."""
        return self._attachments.networks

    def connect(self, link: LinkSpec) -> Mapping[str, object]:
        """Puts one more interface into its network namespace.

        Raises:
            RingfenceError: The network or the host refuses; all is as it was.
        """
        attachment = self._attachments.attach(link)
        try:
            attachment.enter(self._pid)
        except BaseException:
            self._attachments.take(link.network).close()
            raise
        tell_names(self._agent, self._attachments)
        return describe(link.network, attachment)

    def disconnect(self, network: str) -> None:
        """Takes its interface on a network away.

        Raises:
            NotFoundError: It isn't on that network.
        """
        self._attachments.take(network).close()
        tell_names(self._agent, self._attachments)

    def close(self) -> None:
        """Ends it if it still runs, and leaves nothing behind."""
        if self._handle < 0:
            return
        self.kill()
        self.wait(_NOBODY_S)
        self._agent.close()
        self._resources.close()
        os.close(self._handle)
        self._handle = -1


def _launch(spec: MachineSpec, place: Place, phases: Phases, stack: ExitStack) -> ContainerMachine:
    maps = own_maps() if os.geteuid() != 0 else None
    stack.callback(host_tree.remove_copy, place)
    group = machine_group.plan(place)
    stack.callback(machine_group.remove, group)
    path = place.sockets / _SOCKET
    program = init_program.sealed_copy(str(_binaries.find("ringfence-agent")))
    mounts = host_tree.mount_plan(spec.mounts)
    trees = host_tree.give_mounts(mounts, spec, stack)
    # Started first, so that it loads and makes namespaces while the rest is decided here.
    early = _EARLY if maps is None else 0
    launch = spawn(place, path, [program, *trees], early, stack)
    try:
        group.make()
        device_rules = machine_group.limit(group, spec)
        attachments = Attachments(spec, place, "container")
        stack.callback(attachments.close)
        attachments.attach_all()
        plan = _plan(spec, place, stack, group, maps, mounts)
        plan.update(device_rules)
        process = plan["process"]
        if isinstance(process, dict):
            process["program"] = program
        host_tree.tell_network(plan, attachments.interfaces())
        plan["ask_register"] = any(attachments)
        launch.give(plan)
        setup = Setup(launch, maps, attachments, phases)
        setup.follow(until="pid")
    except BaseException:
        launch.reap()
        raise
    agent = ContainedAgent(lambda: sockets.connect(path), group)
    return ContainerMachine(setup, agent, group, place, attachments)


def _plan(
    spec: MachineSpec,
    place: Place,
    stack: ExitStack,
    group: Group,
    maps: Maps | None,
    mounts: list[dict[str, object]],
) -> Plan:
    from ringfence.container import flags

    kinds = [*_KINDS, "user"] if maps is not None else list(_KINDS)
    root = host_tree.root_plan(spec, place, stack, own_users=maps is not None)
    table = template.mounts(rootless=maps is not None and not maps.many)
    # What it may use is not its own to read: a machine has no control groups inside.
    standard = mount_table([m for m in table if m["type"] != "cgroup"], group, kinds)
    links = root.get("links")
    root.update(
        propagation=flags.PROPAGATION["rslave"],
        mounts=[*standard, *mounts],
        devices=device_nodes(bind=maps is not None),
        links=[*(links if isinstance(links, list) else []), *device_links()],
        masked=list(template.MASKED),
        read_only_paths=list(template.READ_ONLY),
    )
    caps = capabilities.mask(capabilities.DEFAULT)
    # Within bounds, but never had: a program whose file would give it, as ping's does, starts at all.
    bounds = capabilities.mask((*capabilities.DEFAULT, "CAP_NET_RAW"))
    new = sum(flags.NAMESPACES[kind] for kind in kinds if kind != "cgroup")
    if maps is None:
        new &= ~_EARLY
    return {
        "unshare": new,
        "map_ids": maps is not None,
        "become_root": maps is not None,
        "cgroup_namespace": True,
        "loopback": True,
        "hostname": host_tree.hostname(spec, place),
        "keyring": f"ringfence-{place.machine_id}",
        "root": root,
        "process": {
            "args": ["ringfence-agent", "--contained"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "uid": 0,
            "gid": 0,
            "groups": [] if maps is None or maps.sets_groups else None,
            "umask": 0o022,
            "capabilities": {
                "bounding": bounds,
                "effective": caps,
                "permitted": caps,
                "inheritable": 0,
                "ambient": 0,
            },
            "no_new_privileges": True,
            "limits": [file_limit()],
            "seccomp": default_profile.compiled(),
        },
        **group.entrance(),
    }

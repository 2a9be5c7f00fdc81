"""Real machines: a VM process with a guest kernel, by the engines ``kvm`` and ``bt``."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, cast

from ringfence import _binaries
from ringfence.errors import AgentError, GuestError, GuestTimeout, RingfenceError, StateError
from ringfence.guest import initramfs, kernels
from ringfence.guest.agent import Agent, connect_vsock
from ringfence.guest.spec import GuestSetup
from ringfence.machine import check, host_root, network_plan, root_plan, sockets
from ringfence.machine.document import Document
from ringfence.machine.driver import Driver, RunningInfo
from ringfence.machine.engine_notes import EngineNotes
from ringfence.machine.network_plan import Attachments, tell_names
from ringfence.machine.spec import HostRoot
from ringfence.machine.vm_process import VmProcess

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.guest.spec import InterfaceSpec, MountSpec, RootSpec
    from ringfence.machine.driver import AgentLike, Ending, Place
    from ringfence.machine.phases import Phases
    from ringfence.machine.spec import MachineSpec
    from ringfence.network import LinkSpec

__all__ = ["VmDriver", "VmMachine", "driver"]

# Each VM process has a vsock of its own, so all guests may have the same address.
_CID = 3
_VSOCK = "vsock"
_POWER_OFF_GRACE_S = 5.0

# What the guest's kernel is told. A panic ends the machine; the agent is its first program.
# The tests of ciphers at every start took a fifth of it.
_CMDLINE = (
    "console=ttyS0 quiet loglevel=3 panic=-1 8250.nr_uarts=1 random.trust_cpu=on cryptomgr.notests"
)
# Under translation every return and indirect jump of the guest is an indirect jump of the
# translator's: the kernel's detours around its own would cost much and hold nothing.
_ENGINE_CMDLINE = {"bt": "mitigations=off"}
# Set to 0: bt translates user code too.
_DIRECT = "RINGFENCE_BT_DIRECT"


def driver() -> Driver:
    """The driver of this module's engines."""
    return VmDriver()


class VmDriver:
    """Starts VM processes."""

    def start(self, spec: MachineSpec, place: Place, phases: Phases) -> VmMachine:
        """Starts a machine and waits until its agent has set it up.

        Raises:
            RingfenceError: See :meth:`ringfence.machine.driver.Driver.start`.
        """
        with phases.measure("check"):
            check.check_host(spec)
        with ExitStack() as stack:
            machine = _launch(spec, place, phases, stack)
            machine.own(stack.pop_all())
        return machine

    def attach(self, place: Place) -> AgentLike:
        """Reaches a machine that another process started.

        Raises:
            StateError: It doesn't answer.
        """
        path = place.sockets / _VSOCK
        if not path.exists():
            message = f"the machine {place.name} is not running"
            raise StateError(message, hint=f"ringfence inspect {place.name} says how it ended")
        return Agent.attach(lambda: connect_vsock(path))

    def clear(self, place: Place) -> None:
        """A VM process ends with its holder, and has nothing of the host that stays."""


class VmMachine:
    """A machine in a VM process.

    Args:
        process: The VM process.
        agent: The guest's agent, set up.
        info: What is known of it.
        attachments: Its networks.
    """

    def __init__(
        self, process: VmProcess, agent: AgentLike, info: RunningInfo, attachments: Attachments
    ) -> None:
        self._process = process
        self._agent = agent
        self._info = info
        self._attachments = attachments
        self._resources = ExitStack()

    def own(self, resources: ExitStack) -> None:
        """Takes over what is to be closed with it."""
        self._resources = resources

    @property
    def agent(self) -> AgentLike:
        """Runs commands in it."""
        return self._agent

    @property
    def info(self) -> RunningInfo:
        """What is known of it."""
        return self._info

    def await_ready(self) -> None:
        """It has been waited for."""

    def pause(self) -> None:
        """Holds its vCPUs."""
        self._process.control.call("pause")

    def resume(self) -> None:
        """Lets its vCPUs go on, with the right time."""
        self._process.control.call("resume")

    def balloon(self, target_mib: int) -> None:
        """Asks the guest to do without this much of its memory."""
        self._process.control.call("balloon", {"target_mib": target_mib})

    def kill(self) -> None:
        """Ends it as pulling the plug does."""
        self._process.kill()

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        """How it ended; None when it still runs after that time."""
        return self._process.wait(timeout_s)

    def stats(self, *, engine_counters: bool = False) -> Mapping[str, object]:
        """What the VM process uses of the host, and its devices' counters."""
        found = dict(self._process.control.call("stats"))
        self._attachments.count(cast("dict[str, dict[str, int]]", found["devices"]))
        if engine_counters:
            found["engine"] = self._process.control.call("counters")
        return found

    def inspect(self) -> Mapping[str, object]:
        """What the VM process says of the machine, and its networks."""
        found = self._process.control.call("inspect")
        return {**found, "networks": self._attachments.describe()}

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that it is on."""
        return self._attachments.networks

    def connect(self, link: LinkSpec) -> Mapping[str, object]:
        """Puts a network card in; the guest looks for it at once.

        Raises:
            RingfenceError: The network or the guest refuses; all is as it was.
        """
        attachment = self._attachments.attach(link)
        interface = attachment.interface
        try:
            device, fds = attachment.device_config()
            card = self._process.control.call("add_card", _numbered(device, fds), fds)
            attachment.plugged(card)
            self._agent.add_interface(interface)
        except BaseException:
            with suppress(RingfenceError):
                self._process.control.call("remove_card", {"mac": interface.mac})
            self._attachments.take(link.network).close()
            raise
        tell_names(self._agent, self._attachments)
        return network_plan.describe(link.network, attachment)

    def disconnect(self, network: str) -> None:
        """Takes a network card out, once the guest has let go of it.

        Raises:
            RingfenceError: The machine isn't on that network.
        """
        attachment = self._attachments.take(network)
        mac = attachment.interface.mac
        try:
            # A guest that doesn't let go loses its card all the same.
            with suppress(GuestError):
                self._agent.remove_interface(mac)
            self._process.control.call("remove_card", {"mac": mac})
        except BaseException:
            self._attachments.give_back(network, attachment)
            raise
        attachment.close()
        tell_names(self._agent, self._attachments)

    def close(self) -> None:
        """Ends it if it still runs, and leaves nothing behind."""
        self._resources.close()


def _launch(spec: MachineSpec, place: Place, phases: Phases, stack: ExitStack) -> VmMachine:
    with phases.measure("kernel"):
        kernel = kernels.find(spec.kernel)
    with phases.measure("initramfs"):
        further = root_plan.modules(spec.root)
        image = initramfs.build(kernel, _binaries.find("ringfence-agent"), further)
    document = Document(
        name=place.name, engine=spec.engine, memory_mib=spec.memory_mib, vcpus=spec.vcpus
    )
    with document, phases.measure("vm process"):
        root = root_plan.add_root(document, spec.root, place.folder, spec.disk_rate)
        mounts = root_plan.extra_mounts(spec.root)
        mounts += root_plan.add_mounts(document, spec.mounts, _owner(spec))
        attachments = Attachments(spec, place, "vm")
        stack.callback(attachments.close)
        attachments.attach_all()
        for attachment in attachments:
            device, fds = attachment.device_config()
            document.lend(fds)
            document.add_made_device(device)
        interfaces = attachments.interfaces()
        document.set(
            "boot",
            {
                "kernel_fd": document.give_file(kernel.image),
                "initramfs_fd": document.give_file(image),
                "cmdline": f"{_CMDLINE} {_ENGINE_CMDLINE.get(spec.engine, '')}".rstrip(),
            },
        )
        document.set("huge_pages", spec.huge_pages)
        if os.environ.get(_DIRECT) == "0":
            document.set("user_code", "translated")
        notes = EngineNotes(document, spec.engine)
        stack.callback(notes.close)
        document.add_device("rng")
        document.add_device("balloon")
        handout = _add_vsock(document, place, stack)
        process = VmProcess(document, place)
        stack.callback(process.kill)
        ready = process.wait_ready()
        notes.started(process.pid)
        attachments.plugged(cast("list[dict[str, object]]", ready.get("cards", [])))
    setup = _setup(spec, place, root, mounts, interfaces)
    agent = _bring_up(process, handout, place, setup, spec.timeouts.boot_s, phases)
    stack.callback(agent.close)
    info = RunningInfo(engine=spec.engine, pid=process.pid, kernel=agent.kernel)
    return VmMachine(process, agent, info, attachments)


def _add_vsock(document: Document, place: Place, stack: ExitStack) -> socket.socket:
    """Adds the guest's sockets, and returns where its own connections are handed out."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(ours.close)
    path = place.sockets / _VSOCK
    listener = sockets.listen(path)
    stack.callback(_remove, path)
    document.add_device(
        "vsock",
        cid=_CID,
        listen_fd=document.give(listener.detach()),
        handout_fd=document.give(theirs.detach()),
    )
    return ours


def _remove(path: os.PathLike[str]) -> None:
    with suppress(OSError):
        os.unlink(path)  # noqa: PTH108 - any kind of path
    with suppress(OSError):
        os.rmdir(os.path.dirname(path))  # noqa: PTH106, PTH120 - likewise


def _setup(
    spec: MachineSpec,
    place: Place,
    root: RootSpec,
    mounts: list[MountSpec],
    interfaces: list[InterfaceSpec],
) -> GuestSetup:
    return GuestSetup(
        root=root,
        hostname=spec.hostname or place.name.replace("_", "-").replace(".", "-")[:63],
        mounts=tuple(mounts),
        interfaces=tuple(interfaces),
        hosts=spec.hosts,
    )


def _numbered(device: dict[str, object], fds: list[int]) -> dict[str, object]:
    """A device whose descriptors go beside it, and are named by their place there."""
    found = {key: value for key, value in device.items() if key != "type"}
    for name in ("tap_fds", "vhost_fds"):
        if name in found:
            found[name] = [fds.index(fd) for fd in cast("list[int]", found[name])]
    if "tap_fds" not in found:
        found["link_fd"] = 0
    return found


def _bring_up(
    process: VmProcess,
    handout: socket.socket,
    place: Place,
    setup: GuestSetup,
    boot_s: float,
    phases: Phases,
) -> Agent:
    """Waits for the guest's agent and tells it what its machine is."""
    path = place.sockets / _VSOCK
    failing = ExitStack()
    try:
        with failing:
            with phases.measure("kernel boot"):
                agent = Agent.accept(handout, lambda: connect_vsock(path), boot_s)
            failing.callback(agent.close)
            # Nobody else is to be reached: further connections of the guest are refused.
            handout.close()
            with phases.measure("guest setup"):
                agent.setup(setup, timeout_s=boot_s)
            failing.pop_all()
    except GuestTimeout as error:
        log = place.folder / "console.log"
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        message = f"the guest was not ready after {boot_s:.0f} s\n{tail}".rstrip()
        raise GuestTimeout(message, hint="give it more: --boot-timeout SECONDS") from error
    except (AgentError, OSError) as error:
        if process.wait(1.0) is None:
            raise
        raise process.failure() from error
    return agent


def _owner(spec: MachineSpec) -> tuple[int, int]:
    """The guest's user and group that own mounted files: those who run the commands."""
    user, _, group = spec.user.partition(":")
    if user.isdigit():
        return int(user), int(group) if group.isdigit() else int(user)
    if user and isinstance(spec.root, HostRoot):
        for line in host_root.passwd_lines():
            fields = line.split(":")
            if fields[0] == user:
                return int(fields[2]), int(fields[3])
    return 0, 0

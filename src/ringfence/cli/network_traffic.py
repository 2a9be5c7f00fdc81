"""What passes through networks: rules, refusals, captures."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ringfence.cli import output
from ringfence.errors import ConfigError, NotFoundError, StateError
from ringfence.machine import state
from ringfence.network import Policy, Rule, gateway, manage
from ringfence.network.store import Store
from ringfence.network.user import control_path

if TYPE_CHECKING:
    import argparse
    from typing import BinaryIO

    from ringfence.network.gateway import Gateway
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["change_policy", "kernel_network", "reach_gateway", "show_refusals", "write_capture"]

_USER_SPACE = ("user", "isolated")


def _machine(name: str) -> state.Record:
    """The machine of a name that is no network's.

    Raises:
        NotFoundError: There is none.
    """
    try:
        return state.find(name).record
    except NotFoundError as error:
        if any(entry.record.id.startswith(name) for entry in state.list_machines()):
            raise
        message = f"there is neither a network nor a machine {name!r}"
        hint = "ringfence network ls and ringfence ps -a list them"
        raise NotFoundError(message, hint=hint) from error


def reach_gateway(name: str) -> Gateway:
    """The gateway of a network, or of a machine that has one of its own.

    Raises:
        NotFoundError: There is neither a network nor a machine of that name.
        StateError: It doesn't run.
    """
    spec = Store().get(name)
    key = name if spec is not None else _machine(name).id
    try:
        return gateway.connect(control_path(key))
    except StateError as error:
        message = f"no gateway runs for {name}"
        hint = "a network has one while machines are on it, a machine with --network user"
        raise StateError(message, hint=hint) from error


def kernel_network(name: str) -> NetworkSpec | None:
    """The network of that name, if the host's kernel serves it."""
    spec = Store().get(name)
    return spec if spec is not None and spec.mode not in _USER_SPACE else None


def _memberships(machine_id: str) -> list[tuple[NetworkSpec, Member]]:
    store = Store()
    return [
        (spec, member)
        for name in store.names()
        if (spec := store.get(name)) is not None
        for member, lives in store.members(name)
        if lives and member.machine_id == machine_id
    ]


def change_policy(args: argparse.Namespace) -> int:
    """Changes who a network or a machine reaches; says who, when nothing is to be changed."""
    policy = Policy(allow=tuple(args.allow), deny=tuple(args.deny), default=args.default)
    if args.clear and policy.says_something:
        message = "rules can't be given and cleared at once"
        raise ConfigError(message)
    spec = Store().get(args.name)
    if not args.clear and not policy.says_something:
        return _show_policy(args.name)
    if spec is not None:
        manage.set_policy(args.name, policy)
        return 0
    record = _machine(args.name)
    changed = manage.set_machine_policy(record.id, policy)
    try:
        with gateway.connect(control_path(record.id)) as running:
            running.call("set_policy", policy.document())
    except StateError:
        if not changed:
            message = f"the machine {args.name} is on no network"
            raise StateError(message) from None
    return 0


def _show_policy(name: str) -> int:
    spec = Store().get(name)
    rows: list[tuple[str, str]] = []
    if spec is not None:
        rows += _rows(spec.name, spec.policy)
        for member, lives in Store().members(name):
            if lives and member.policy.says_something:
                rows += _rows(member.name or member.machine_id, member.policy)
    else:
        record = _machine(name)
        for shared, member in _memberships(record.id):
            rows += _rows(shared.name, member.policy)
        if "user" in record.network.split(", "):
            with reach_gateway(name) as running:
                document = cast("dict[str, object]", running.status()["policy"])
            rules = cast("list[dict[str, object]]", document["rules"])
            rows += [("user", str(Rule.of(rule))) for rule in rules]
            rows.append(("user", f"{document['default']} the rest"))
    output.print_table(("WHOSE" if spec is not None else "NETWORK", "RULE"), rows)
    return 0


def _rows(whose: str, policy: Policy) -> list[tuple[str, str]]:
    rest = "deny" if policy.refuses_by_default else "allow"
    return [*((whose, str(rule)) for rule in policy.rules), (whose, f"{rest} the rest")]


def _refusals(name: str) -> dict[str, object]:
    spec = kernel_network(name)
    if spec is None and Store().get(name) is None:
        record = _machine(name)
        shared = _memberships(record.id)
        if shared and "user" not in record.network.split(", "):
            return _refusals_of_member(shared)
    if spec is None:
        with reach_gateway(name) as running:
            return _by_name(dict(running.refusals()), name)
    from ringfence.network import kernel  # noqa: PLC0415 - for these modes alone

    return kernel.refusals(spec)


def _by_name(found: dict[str, object], network: str) -> dict[str, object]:
    """What a gateway refused, with machines' names: it knows them by their IDs."""
    members = [member for member, _ in Store().members(network)]
    names = {one.machine_id: one.name for one in members if one.name}
    if Store().get(network) is None:
        record = _machine(network)
        names[record.id] = record.name
    recent = cast("list[dict[str, object]]", found["recent"])
    return {**found, "recent": [_with_name(one, names) for one in recent]}


def _with_name(refusal: dict[str, object], names: dict[str, str]) -> dict[str, object]:
    machine = str(refusal["port"])
    return {**refusal, "port": names.get(machine, machine)}


def _refusals_of_member(shared: list[tuple[NetworkSpec, Member]]) -> dict[str, object]:
    recent: list[dict[str, object]] = []
    for spec, member in shared:
        whole = cast("list[dict[str, object]]", _refusals(spec.name)["recent"])
        recent += [one for one in whole if one["port"] in (member.name, member.machine_id)]
    return {"recent": recent}


def show_refusals(args: argparse.Namespace) -> int:
    """Shows what was refused, and why."""
    found = _refusals(args.name)
    if args.format == "json":
        output.print_json(found)
        return 0
    recent = cast("list[dict[str, object]]", found["recent"])
    rows = [
        (
            output.ago(float(str(one["time"]))),
            str(one["port"]),
            f"{one['transport']} {one['destination']}",
            str(one["reason"]),
        )
        for one in recent
    ]
    output.print_table(("WHEN", "MACHINE", "WHERE TO", "WHY"), rows)
    return 0


def _machine_link(spec: NetworkSpec, machine: str) -> str:
    for member, lives in Store().members(spec.name):
        if lives and machine in (member.name, member.machine_id) and member.link:
            return member.link
    message = f"no machine {machine!r} is on the network {spec.name}"
    raise NotFoundError(message, hint=f"ringfence network inspect {spec.name} lists them")


def write_capture(args: argparse.Namespace) -> int:
    """Writes what passes as pcap, until it is interrupted."""
    if args.output == "-" and sys.stdout.isatty():
        message = "a capture is not for a terminal"
        raise ConfigError(message, hint="-o FILE, or | tcpdump -r - or wireshark -k -i -")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    name, machine = args.name, args.machine
    spec = kernel_network(name)
    if spec is None and Store().get(name) is None:
        record = _machine(name)
        shared = [(one, member) for one, member in _memberships(record.id)]
        if shared and "user" not in record.network.split(", "):
            spec, machine = shared[0][0], record.id
            name = spec.name
            spec = kernel_network(name)
    with ExitStack() as stack:
        if spec is not None:
            from ringfence.network import kernel, links  # noqa: PLC0415 - for these modes alone
            from ringfence.network.capture import capture  # noqa: PLC0415 - likewise

            links.require_rights(spec.mode)
            link = _machine_link(spec, machine) if machine else kernel.bridge_of(spec)
            capture(link, stack.enter_context(_opened(args.output)), ended.is_set)
            return 0
        running = stack.enter_context(reach_gateway(name))
        file = stack.enter_context(_opened(args.output))
        port = _port_name(name, machine) if machine else None
        running.call("capture_start", {"fd": 0, "port": port}, [file.fileno()])
        while not ended.wait(0.5):
            running.status()
        running.call("capture_stop")
    return 0


def _port_name(network: str, machine: str) -> str:
    """A gateway knows machines by their IDs."""
    for member, lives in Store().members(network):
        if lives and machine in (member.name, member.machine_id):
            return member.machine_id
    return machine


def _opened(path: str) -> BinaryIO:
    if path == "-":
        return cast("BinaryIO", sys.stdout.buffer)
    try:
        return Path(path).open("wb")
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}"
        raise ConfigError(message) from error

"""``ringfence network``: networks that machines share, and what passes through them."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ringfence.cli import output
from ringfence.errors import ConfigError, RingfenceError, StateError, UnsupportedError
from ringfence.machine import state
from ringfence.network import Policy, gateway, manage
from ringfence.network.store import MODES, NetworkSpec, Store
from ringfence.network.user import control_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ringfence.network.gateway import Gateway


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=help_text, allow_abbrev=False)

    creating = add("create", "make a network")
    creating.add_argument("name", metavar="NAME")
    creating.add_argument("--mode", choices=MODES, default="user", help="what it reaches (user)")
    creating.add_argument(
        "--subnet", action="append", default=[], metavar="CIDR",
        help="its addresses; once for IPv4 and once for IPv6 (chosen)",
    )  # fmt: skip
    creating.add_argument("--mtu", type=int, default=0, metavar="BYTES", help="the largest packet")
    creating.add_argument("--interface", default="", metavar="IF", help="with --mode bridge")
    _add_rules(creating)
    listing = add("ls", "list networks")
    output.add_format(listing)
    listing.add_argument("-q", "--quiet", action="store_true", help="names only")
    inspecting = add("inspect", "show a network, or a machine's own, as JSON")
    inspecting.add_argument("name", metavar="NETWORK|MACHINE")
    removing = add("rm", "remove networks")
    removing.add_argument("names", nargs="+", metavar="NAME")
    rules = add("policy", "change who a network's or a machine's own gateway lets through, at once")
    rules.add_argument("name", metavar="NETWORK|MACHINE")
    _add_rules(rules)
    refusals = add("refusals", "show what was refused, and why")
    refusals.add_argument("name", metavar="NETWORK|MACHINE")
    output.add_format(refusals)
    capture = add("capture", "write what passes as pcap, until it is interrupted")
    capture.add_argument("name", metavar="NETWORK|MACHINE")
    capture.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="where to; - is the output"
    )
    capture.add_argument(
        "--machine", default=None, metavar="ID", help="only what is this machine's"
    )


def _add_rules(parser: argparse.ArgumentParser) -> None:
    for name, what in (("--allow", "let through, and nothing else"), ("--deny", "refuse")):
        parser.add_argument(
            name, action="append", default=[], metavar="WHAT",
            help=f"{what}: CIDR, domain or *.domain, with :PORT if need be",
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "create": _create,
        "ls": _list,
        "inspect": _inspect,
        "rm": _remove,
        "policy": _policy,
        "refusals": _refusals,
        "capture": _capture,
    }
    manage.heal()
    return actions[args.action](args)


def _create(args: argparse.Namespace) -> int:
    spec = manage.create(
        NetworkSpec(
            name=args.name,
            mode=args.mode,
            subnets=tuple(args.subnet),
            mtu=args.mtu,
            interface=args.interface,
            allow=tuple(args.allow),
            deny=tuple(args.deny),
        )
    )
    print(spec.name)
    if spec.mode == "routed":
        for subnet in spec.subnets:
            print(f"other hosts need: ip route add {subnet} via THIS-HOST", file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    store = Store()
    specs = [spec for name in store.names() if (spec := store.get(name)) is not None]
    if args.quiet:
        for spec in specs:
            print(spec.name)
    elif args.format == "json":
        output.print_json([asdict(spec) for spec in specs])
    else:
        rows = [
            (
                spec.name,
                spec.mode,
                ", ".join(spec.subnets) or spec.interface,
                str(sum(lives for _, lives in store.members(spec.name))),
                output.ago(spec.created_s),
            )
            for spec in specs
        ]
        output.print_table(("NAME", "MODE", "SUBNETS", "MACHINES", "CREATED"), rows)
    return 0


def _gateway(name: str) -> Gateway:
    """The gateway of a network, or of a machine that has one of its own.

    Raises:
        NotFoundError: There is neither a network nor a machine of that name.
        UnsupportedError: The network has none.
        StateError: It doesn't run.
    """
    spec = Store().get(name)
    if spec is not None and spec.mode not in ("user", "isolated"):
        message = f"the network {name} of the mode {spec.mode} is the host kernel's"
        hint = "ringfence network inspect shows its link: tcpdump -i LINK"
        raise UnsupportedError(message, hint=hint)
    key = name if spec is not None else state.find(name).record.id
    try:
        return gateway.connect(control_path(key))
    except StateError as error:
        message = f"no gateway runs for {name}"
        hint = "a network has one while machines are on it, a machine with --network user"
        raise StateError(message, hint=hint) from error


def _inspect(args: argparse.Namespace) -> int:
    store = Store()
    spec = store.get(args.name)
    found: dict[str, object] = {}
    if spec is not None:
        found |= asdict(spec)
        found["machines"] = [asdict(member) for member, lives in store.members(args.name) if lives]
        if spec.mode not in ("user", "isolated"):
            from ringfence.network.kernel import describe  # noqa: PLC0415 - for these modes alone

            found["host"] = describe(spec)
    if spec is None or spec.mode in ("user", "isolated"):
        try:
            with _gateway(args.name) as running:
                found["gateway"] = running.status()
        except StateError:
            if spec is None:
                raise
    output.print_json(found)
    return 0


def _remove(args: argparse.Namespace) -> int:
    failed = 0
    for name in args.names:
        try:
            manage.remove(name)
        except RingfenceError as error:
            print(f"ringfence: {error}", file=sys.stderr)
            failed = 125
        else:
            print(name)
    return failed


def _policy(args: argparse.Namespace) -> int:
    policy = Policy(allow=tuple(args.allow), deny=tuple(args.deny))
    with _gateway(args.name) as running:
        running.call("set_policy", policy.document())
    return 0


def _refusals(args: argparse.Namespace) -> int:
    with _gateway(args.name) as running:
        found = running.refusals()
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


def _capture(args: argparse.Namespace) -> int:
    if args.output == "-" and sys.stdout.isatty():
        message = "a capture is not for a terminal"
        raise ConfigError(message, hint="-o FILE, or | tcpdump -r - or wireshark -k -i -")
    with _gateway(args.name) as running:
        file = sys.stdout.buffer if args.output == "-" else Path(args.output).open("wb")  # noqa: SIM115
        with file:
            params = {"fd": 0, "port": args.machine}
            running.call("capture_start", params, [file.fileno()])
            try:
                signal.pause()
            except KeyboardInterrupt:
                running.call("capture_stop")
    return 0

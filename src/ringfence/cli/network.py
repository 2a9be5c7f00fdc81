"""``ringfence network``: networks that machines share, and what passes through them."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from ringfence.cli import network_traffic, output
from ringfence.errors import RingfenceError, StateError
from ringfence.machine.attached import AttachedMachine
from ringfence.network import manage
from ringfence.network.options import name_of
from ringfence.network.store import MODES, NetworkSpec, Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ringfence.network.store import Member


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
    creating.add_argument(
        "--lease", action="append", default=[], metavar="NAME=IP",
        help="keep an address for the machine of that name",
    )  # fmt: skip
    _add_rules(creating)
    connecting = add("connect", "give a running machine one more interface")
    connecting.add_argument("network", metavar="NETWORK", help="a network's name, or a mode")
    connecting.add_argument("machine", metavar="MACHINE")
    connecting.add_argument(
        "--ip", action="append", default=[], metavar="IP", help="its address there (chosen)"
    )
    connecting.add_argument("--mac", default="", help="its Ethernet address there (derived)")
    disconnecting = add("disconnect", "take a running machine's interface away")
    disconnecting.add_argument("network", metavar="NETWORK")
    disconnecting.add_argument("machine", metavar="MACHINE")
    listing = add("ls", "list networks")
    output.add_format(listing)
    listing.add_argument("-q", "--quiet", action="store_true", help="names only")
    inspecting = add("inspect", "show a network, or a machine's own, as JSON")
    inspecting.add_argument("name", type=name_of, metavar="NETWORK|MACHINE")
    removing = add("rm", "remove networks")
    removing.add_argument("names", type=name_of, nargs="+", metavar="NAME")
    rules = add("policy", "show or change who a network or a machine reaches, at once")
    rules.add_argument("name", type=name_of, metavar="NETWORK|MACHINE")
    _add_rules(rules)
    rules.add_argument("--clear", action="store_true", help="no rules at all")
    refusals = add("refusals", "show what was refused, and why")
    refusals.add_argument("name", type=name_of, metavar="NETWORK|MACHINE")
    output.add_format(refusals)
    capture = add("capture", "write what passes as pcap, until it is interrupted")
    capture.add_argument("name", type=name_of, metavar="NETWORK|MACHINE")
    capture.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="where to; - is the output"
    )
    capture.add_argument(
        "--machine", default=None, metavar="MACHINE", help="only what is this machine's"
    )


def _add_rules(parser: argparse.ArgumentParser) -> None:
    for name, what in (("--allow", "let through, and nothing else"), ("--deny", "refuse")):
        parser.add_argument(
            name, action="append", default=[], metavar="WHAT",
            help=f"{what}: CIDR, domain or *.domain, with :PORT if need be",
        )  # fmt: skip
    parser.add_argument(
        "--default", choices=("allow", "deny"), default=None,
        help="what becomes of the rest (deny when there is an --allow, else allow)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "create": _create,
        "ls": _list,
        "inspect": _inspect,
        "rm": _remove,
        "connect": _connect,
        "disconnect": _disconnect,
        "policy": network_traffic.change_policy,
        "refusals": network_traffic.show_refusals,
        "capture": network_traffic.write_capture,
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
            default=args.default,
            leases=tuple(args.lease),
        )
    )
    print(spec.name)
    if spec.mode == "routed":
        from ringfence.network.kernel import routes_to  # noqa: PLC0415 - for this mode alone

        for route in routes_to(spec):
            print(f"other hosts need: {route}", file=sys.stderr)
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


def _inspect(args: argparse.Namespace) -> int:
    store = Store()
    spec = store.get(args.name)
    if spec is None:
        with network_traffic.reach_gateway(args.name) as running:
            output.print_json({"gateway": running.status()})
        return 0
    found: dict[str, object] = asdict(spec)
    members = [member for member, lives in store.members(args.name) if lives]
    found["machines"] = [_described(member) for member in members]
    if network_traffic.kernel_network(args.name) is not None:
        from ringfence.network.kernel import describe  # noqa: PLC0415 - for these modes alone

        found["host"] = describe(spec)
    else:
        with suppress(StateError), network_traffic.reach_gateway(args.name) as running:
            found["gateway"] = running.status()
    output.print_json(found)
    return 0


def _described(member: Member) -> dict[str, object]:
    found: dict[str, object] = asdict(member)
    if member.link:
        from ringfence.network.links import statistics  # noqa: PLC0415 - for links of the kernel

        found["counters"] = statistics(member.link)
    return found


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


def _connect(args: argparse.Namespace) -> int:
    with AttachedMachine(args.machine) as machine:
        found = machine.connect(args.network, ip=tuple(args.ip), mac=args.mac)
    output.print_json(dict(found))
    return 0


def _disconnect(args: argparse.Namespace) -> int:
    with AttachedMachine(args.machine) as machine:
        machine.disconnect(args.network)
    return 0

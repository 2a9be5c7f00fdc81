"""The options that say what a machine is, as the verbs that make one share them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from ringfence.errors import ConfigError
from ringfence.machine.options import MachineOptions, spec_from
from ringfence.machine.spec import ENGINES, Mount

if TYPE_CHECKING:
    from ringfence.machine.spec import MachineSpec

__all__ = ["add_machine_options", "add_process_options", "environment", "machine_spec"]


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says what the machine is."""
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--name", default="", help="its name; made up unless given")
    machine.add_argument(
        "--engine", default="auto", metavar="ENGINE",
        help=f"{', '.join(ENGINES)}: what runs it (auto: the best real machine here, as measured)",
    )  # fmt: skip
    machine.add_argument("--vcpus", type=int, default=1, metavar="N", help="virtual processors (1)")
    machine.add_argument("-m", "--memory", default="512M", metavar="SIZE", help="RAM (512M)")
    machine.add_argument(
        "--huge-pages", default="off", metavar="KIND",
        help="off, transparent or reserved: the host's pages for its RAM (off)",
    )  # fmt: skip
    machine.add_argument(
        "--kernel", metavar="VERSION|PATH", help="the guest's kernel (the newest at hand)"
    )
    machine.add_argument("--hostname", default="", metavar="NAME", help="its name for itself")
    _add_network_options(parser)
    files = parser.add_argument_group("its files (the host's own programs unless said otherwise)")
    files.add_argument("--image", metavar="REFERENCE", help="an OCI image")
    files.add_argument(
        "--entrypoint", metavar="WORDS", help="what comes before the command, for the image's own"
    )
    files.add_argument("--root", metavar="DIRECTORY", help="a directory of the host")
    files.add_argument("--disk", metavar="FILE", help="a disk image, together with --disk-format")
    files.add_argument("--disk-format", metavar="FORMAT", help="raw or qcow2: never guessed")
    files.add_argument(
        "--disk-partition", type=int, metavar="N", help="its root's partition (found; 0: the whole)"
    )
    files.add_argument(
        "--disk-filesystem", metavar="TYPE", help="what is on it, as mount -t has it (found)"
    )
    files.add_argument(
        "--disk-bandwidth", metavar="SIZE", help="bytes a second of its disk: 500K, 10M"
    )
    files.add_argument("--disk-iops", type=int, metavar="N", help="requests a second of its disk")
    files.add_argument(
        "--writable", action="store_true",
        help="changes go to the directory or disk itself, not to memory",
    )  # fmt: skip
    files.add_argument(
        "-v", "--mount", action="append", default=[], metavar="SRC:DST[:ro]",
        help="a directory or file of the host",
    )  # fmt: skip
    files.add_argument(
        "--here", action="store_const", const="ro",
        help="this directory, read only, as the working directory",
    )  # fmt: skip
    # A value is only ever part of the word, so that a command may follow.
    files.add_argument(
        "--here=rw", dest="here", action="store_const", const="rw", help="likewise, writable"
    )
    files.add_argument(
        "--here=ro", dest="here", action="store_const", const="ro", help=argparse.SUPPRESS
    )
    times = parser.add_argument_group("times, in seconds")
    times.add_argument("--timeout", type=float, metavar="S", help="the command's")
    times.add_argument(
        "--machine-timeout", type=float, metavar="S", help="the machine's whole life"
    )
    times.add_argument(
        "--idle-timeout", type=float, metavar="S", help="without any command running"
    )
    times.add_argument(
        "--boot-timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="until it takes commands (120)",
    )


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("its network")
    network.add_argument(
        "--network", action="append", default=[], metavar="NETWORK",
        help="none, user, isolated, nat, host-only, routed:CIDR, bridge:IF or a network's name, with "
        ",ip=IP and ,mac=MAC behind if need be; again for a further interface (user)",
    )  # fmt: skip
    network.add_argument(
        "--ip", action="append", default=[], metavar="IP",
        help="its address on the first network (chosen)",
    )  # fmt: skip
    network.add_argument(
        "--mac", default="", metavar="MAC", help="its Ethernet address there (derived)"
    )
    network.add_argument(
        "-p", "--publish", action="append", default=[], metavar="[IP:]HOST:GUEST[/udp]",
        help="publish a port of it on the host (on its loopback)",
    )  # fmt: skip
    network.add_argument(
        "--allow", action="append", default=[], metavar="WHAT",
        help="let it reach this and nothing else: CIDR, domain, *.domain, with :PORT if need be",
    )  # fmt: skip
    network.add_argument(
        "--deny", action="append", default=[], metavar="WHAT", help="keep it from reaching this"
    )
    network.add_argument(
        "--default", choices=("allow", "deny"), default=None,
        help="what becomes of what no rule is about (deny when there is an --allow, else allow)",
    )  # fmt: skip
    network.add_argument(
        "--dns", action="append", default=[], metavar="IP", help="ask this name server"
    )
    network.add_argument(
        "--add-host", action="append", default=[], metavar="NAME:IP", help="a name that it knows"
    )
    network.add_argument(
        "--bandwidth", metavar="SIZE", help="bytes a second that pass, each way: 500K, 10M"
    )


def _hosts(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, colon, address = text.partition(":")
        if not (name and colon and address):
            message = f"{text!r} is not a name with an address"
            raise ConfigError(message, hint="write NAME:IP")
        found[name] = address.removeprefix("[").removesuffix("]")
    return found


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how a command runs."""
    command = parser.add_argument_group("the command")
    command.add_argument("-w", "--workdir", default="", metavar="DIR", help="where it runs (/)")
    command.add_argument(
        "-u", "--user", default="", metavar="USER[:GROUP]", help="who runs it (root)"
    )
    command.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="its environment; without a value the host's",
    )  # fmt: skip
    command.add_argument(
        "-t", "--tty", action="store_true", default=None,
        help="give it a terminal (as it is when standard input and output are one)",
    )  # fmt: skip
    command.add_argument("-T", "--no-tty", dest="tty", action="store_false", help="give it none")
    command.add_argument(
        "-i", "--interactive", action="store_true", default=None,
        help="pass standard input on (as is done unless in the background)",
    )  # fmt: skip


def environment(given: list[str]) -> dict[str, str]:
    """Variables as ``NAME=VALUE``, or ``NAME`` for the host's own value.

    Raises:
        ConfigError: A name is empty.
    """
    import os  # noqa: PLC0415 - the module is for one function only

    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name:
            message = f"{text!r} is not an environment variable"
            raise ConfigError(message, hint="write NAME=VALUE, or NAME for the host's own value")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def machine_spec(args: argparse.Namespace) -> MachineSpec:
    """The specification that the options stand for.

    Raises:
        ConfigError: They contradict one another, or a value isn't possible.
    """
    mounts = [Mount.parse(text) for text in args.mount]
    workdir = args.workdir
    if args.here:
        here = Path.cwd()
        if here == Path("/"):
            message = "--here can't share the whole host: the current directory is /"
            raise ConfigError(message, hint="change into the directory that the command needs")
        target = PurePosixPath(here)
        mounts.append(Mount(source=here, target=target, read_only=args.here != "rw"))
        workdir = workdir or str(target)
    options: MachineOptions = {
        "name": args.name,
        "engine": args.engine,
        "vcpus": args.vcpus,
        "memory": args.memory,
        "huge_pages": args.huge_pages,
        "mounts": mounts,
        "workdir": workdir,
        "env": environment(args.env),
        "user": args.user,
        "network": args.network or "user",
        "ip": args.ip,
        "mac": args.mac,
        "default": args.default,
        "ports": args.publish,
        "allow": args.allow,
        "deny": args.deny,
        "dns": args.dns,
        "hosts": _hosts(args.add_host),
        "bandwidth": args.bandwidth,
        "disk_bandwidth": args.disk_bandwidth,
        "disk_iops": args.disk_iops,
        "hostname": args.hostname,
        "boot_timeout_s": args.boot_timeout,
        "writable": args.writable,
    }
    if args.entrypoint is not None:
        options["entrypoint"] = shlex.split(args.entrypoint)
    optional = {
        "kernel": args.kernel,
        "image": args.image,
        "root": args.root,
        "disk": args.disk,
        "disk_format": args.disk_format,
        "disk_partition": args.disk_partition,
        "disk_filesystem": args.disk_filesystem,
        "command_timeout_s": args.timeout,
        "timeout_s": args.machine_timeout,
        "idle_timeout_s": args.idle_timeout,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    options |= cast("MachineOptions", given)
    return spec_from(options)

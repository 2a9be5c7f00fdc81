"""``ringfence image create|build``: images made here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.errors import ConfigError, HostError, NotFoundError
from ringfence.image.platforms import Platform

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

    from ringfence.image.store import Store

__all__ = ["build", "configure", "create"]


def configure(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Adds the verbs' arguments."""
    creating = add("create", "make a base image without a registry")
    creating.add_argument("name", metavar="NAME", help="what to call it")
    source = creating.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-dir", metavar="DIRECTORY", help="of a root file system's files")
    source.add_argument("--from-tar", metavar="FILE", help="of its tar; - is the input")
    source.add_argument("--from-host", action="store_true", help="of this host's own programs")
    source.add_argument("--debootstrap", metavar="SUITE", help="of Debian's or Ubuntu's packages")
    creating.add_argument("--mirror", metavar="URL", help="where debootstrap's packages are")
    creating.add_argument(
        "--include", default="", metavar="PACKAGE,...", help="further packages for debootstrap"
    )
    creating.add_argument("-q", "--quiet", action="store_true", help="print the identity only")
    _configure_build(add("build", "build an image from a Dockerfile"))


def _configure_build(building: argparse.ArgumentParser) -> None:
    building.add_argument("context", metavar="DIRECTORY", help="where COPY takes files from")
    building.add_argument("-t", "--tag", action="append", default=[], metavar="NAME")
    building.add_argument("-f", "--file", metavar="FILE", help="the Dockerfile; - is the input")
    building.add_argument("--target", default="", metavar="STAGE", help="the stage to build")
    building.add_argument("--build-arg", action="append", default=[], metavar="NAME[=VALUE]")
    building.add_argument("--label", action="append", default=[], metavar="NAME=VALUE")
    building.add_argument(
        "--secret", action="append", default=[], metavar="id=ID,src=FILE",
        help="a file that RUN --mount=type=secret may see",
    )  # fmt: skip
    building.add_argument("--platform", type=Platform.parse, help="of the base images")
    building.add_argument("--no-cache", action="store_true", help="use nothing of earlier builds")
    building.add_argument("--pull", action="store_true", help="fetch base images anew")
    building.add_argument("--plain-http", action="store_true", help="registries without encryption")
    building.add_argument(
        "--engine", default="auto", help="what runs the commands (auto: a real machine)"
    )
    building.add_argument("-m", "--memory", default="1G", metavar="SIZE", help="RAM for RUN (1G)")
    building.add_argument(
        "--vcpus", type=int, default=1, metavar="N", help="processors for RUN (1)"
    )
    building.add_argument("--network", default="user", metavar="MODE", help="for RUN (user)")
    building.add_argument("-q", "--quiet", action="store_true", help="print the identity only")


def create(store: Store, args: argparse.Namespace) -> int:
    """Makes the image and prints its identity."""
    from ringfence.image import create as making  # noqa: PLC0415 - only this verb needs it

    if (args.mirror or args.include) and not args.debootstrap:
        msg = "--mirror and --include are for --debootstrap"
        raise ConfigError(msg)
    with output.Spinner(f"making {args.name}", quiet=args.quiet):
        if args.debootstrap:
            packages = tuple(name for name in args.include.split(",") if name)
            mirror = {"mirror": args.mirror} if args.mirror else {}
            image = making.from_debootstrap(
                store, args.debootstrap, args.name, packages=packages, **mirror
            )
        elif args.from_host:
            image = making.from_host(store, args.name)
        elif args.from_dir:
            image = making.from_directory(store, Path(args.from_dir), args.name)
        else:
            source = sys.stdin.buffer if args.from_tar == "-" else Path(args.from_tar)
            image = making.from_tar(store, source, args.name)
    print(image.id if args.quiet else f"{args.name}: {output.size(image.size)}, {image.id}")
    return 0


def build(store: Store, args: argparse.Namespace) -> int:
    """Builds the image and prints its identity."""
    from ringfence.image import build as building  # noqa: PLC0415 - only this verb needs it
    from ringfence.machine.image_runner import MachineRunner  # noqa: PLC0415
    from ringfence.machine.options import memory_mib  # noqa: PLC0415

    context = Path(args.context)
    options = building.BuildOptions(
        tags=tuple(args.tag),
        target=args.target,
        build_args=_pairs(args.build_arg, os.environ),
        platform=args.platform or Platform.host(),
        labels=_pairs(args.label, {}),
        secrets=dict(map(_secret, args.secret)),
        cache=not args.no_cache,
        pull=args.pull,
        plain_http=args.plain_http,
        say=_nothing if args.quiet else _say,
        output=_nothing if args.quiet else _output,
    )
    runner = MachineRunner(
        args.engine, memory_mib=memory_mib(args.memory), vcpus=args.vcpus, network=args.network
    )
    image = building.build(store, context, _dockerfile(context, args.file), runner, options)
    name = args.tag[0] if args.tag else "built"
    print(image.id if args.quiet else f"{name}: {output.size(image.size)}, {image.id}")
    return 0


def _dockerfile(context: Path, given: str | None) -> str:
    if given == "-":
        return sys.stdin.read()
    names = [Path(given)] if given else [context / "Dockerfile", context / "Containerfile"]
    for path in names:
        try:
            return path.read_text()
        except FileNotFoundError:
            continue
        except OSError as error:
            msg = f"cannot read {path}: {error.strerror}"
            raise HostError(msg, errno=error.errno, path=str(path)) from error
    msg = f"there is no {names[0]}"
    raise NotFoundError(msg, hint="say where it is: --file FILE")


def _pairs(given: list[str], known: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals:
            found[name] = value
        elif name in known:
            found[name] = known[name]
    return found


def _secret(text: str) -> tuple[str, Path]:
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    source = fields.get("src") or fields.get("source") or ""
    if not fields.get("id") or not source:
        msg = f"{text!r} is not a secret"
        raise ConfigError(msg, hint="write id=NAME,src=FILE")
    return fields["id"], Path(source)


def _nothing(_: object) -> None:
    pass


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _output(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()

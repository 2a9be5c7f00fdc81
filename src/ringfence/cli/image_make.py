"""``ringfence image create``: base images without a registry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ringfence.image.store import Store

__all__ = ["configure", "create"]


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

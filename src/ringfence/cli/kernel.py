"""``ringfence kernel``: the kernels that guests can boot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.guest import kernels

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="list kernels, the one that is used first")
    output.add_format(listing)
    listing.add_argument("-q", "--quiet", action="store_true", help="versions only")
    fetching = actions.add_parser("fetch", help="fetch the distribution's kernel")
    fetching.add_argument("-q", "--quiet", action="store_true", help="no progress")
    importing = actions.add_parser("import", help="take a kernel of your own")
    importing.add_argument("image", metavar="FILE", help="a bzImage or vmlinux")
    importing.add_argument("--modules", metavar="DIRECTORY", help="its modules: .../VERSION")
    importing.add_argument("--version", default="", help="its version, where the image hides it")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    if args.action == "ls":
        return _list(args)
    if args.action == "fetch":
        with output.Spinner("fetching the distribution's kernel", quiet=args.quiet):
            kernel = kernels.fetch()
    else:
        modules = Path(args.modules) if args.modules else None
        kernel = kernels.import_kernel(Path(args.image), modules=modules, version=args.version)
    print(kernel.version)
    return 0


def _list(args: argparse.Namespace) -> int:
    found = kernels.list_kernels()
    if args.quiet:
        for kernel in found:
            print(kernel.version)
    elif args.format == "json":
        output.print_json(
            [
                {
                    "version": kernel.version,
                    "source": kernel.source,
                    "image": str(kernel.image),
                    "modules": str(kernel.modules),
                }
                for kernel in found
            ]
        )
    else:
        rows = [(kernel.version, kernel.source, str(kernel.image)) for kernel in found]
        output.print_table(("VERSION", "SOURCE", "IMAGE"), rows)
    return 0

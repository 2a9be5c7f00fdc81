"""``ringfence image``: images, from and to registries, archives, directories and Dockerfiles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.cli import image_make, image_show, output
from ringfence.cli.image_progress import Bars
from ringfence.errors import ConfigError
from ringfence.image.platforms import Platform
from ringfence.image.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    Verb = Callable[[Store, argparse.Namespace], int]


_UNPACK = "unpack the layers now, not when a machine needs them"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=help_text, allow_abbrev=False)

    _configure_transfer(add)
    _configure_show(add)
    image_make.configure(add)
    importing = add("import", "take images from an OCI layout or a docker-archive")
    importing.add_argument("source", metavar="PATH", help="a directory or a tar; - is the input")
    importing.add_argument("--name", metavar="IMAGE", help="what to call it")
    importing.add_argument("--unpack", action="store_true", help=_UNPACK)
    exporting = add("export", "write images to a file or directory")
    exporting.add_argument("images", nargs="+", metavar="IMAGE")
    exporting.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="PATH",
        help="where to; - is the output",
    )
    exporting.add_argument(
        "--as",
        dest="archive",
        choices=("oci-archive", "oci", "docker-archive"),
        default="oci-archive",
        help="the format; oci is a directory (oci-archive)",
    )
    tagging = add("tag", "give an image a further name")
    tagging.add_argument("image", metavar="IMAGE")
    tagging.add_argument("name", metavar="NAME")
    removing = add("rm", "forget names of images")
    removing.add_argument("images", nargs="+", metavar="IMAGE")
    pruning = add("prune", "remove what no name leads to")
    pruning.add_argument(
        "-a",
        "--all",
        action="store_true",
        help="all images that no machine uses, too",
    )


def _configure_transfer(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    plain = "speak to the registry without encryption"
    pulling = add("pull", "fetch an image from its registry")
    pulling.add_argument("images", nargs="+", metavar="IMAGE")
    pulling.add_argument("--unpack", action="store_true", help=_UNPACK)
    pulling.add_argument("--platform", type=Platform.parse, help="linux/amd64, linux/arm64, ...")
    pushing = add("push", "send an image to a registry")
    pushing.add_argument("image", metavar="IMAGE")
    pushing.add_argument("destination", nargs="?", metavar="NAME", help="its name there (the same)")
    for parser in (pulling, pushing):
        parser.add_argument("--plain-http", action="store_true", help=plain)
        parser.add_argument("-q", "--quiet", action="store_true", help="print the digest only")
    login = add("login", "keep a name and a password for a registry")
    login.add_argument("registry", metavar="REGISTRY", help="its host, with its port if it has one")
    login.add_argument("-u", "--username", help="the name; asked for when missing")
    login.add_argument(
        "--password-stdin",
        action="store_true",
        help="read the password from the input",
    )


def _configure_show(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    listing = add("ls", "list images")
    output.add_format(listing)
    listing.add_argument(
        "-q",
        "--quiet",
        action="count",
        default=0,
        help="identities only; twice: whole ones",
    )
    inspecting = add("inspect", "show images as JSON")
    inspecting.add_argument("images", nargs="+", metavar="IMAGE")
    inspecting.add_argument("--platform", type=Platform.parse, help="of several platforms, which")
    inspecting.add_argument("--raw", action="store_true", help="the manifest or index as it came")
    history = add("history", "show how an image came about")
    history.add_argument("image", metavar="IMAGE")
    history.add_argument("--no-trunc", action="store_true", help="whole instructions")
    output.add_format(history)
    diff = add("diff", "show what an image changes: A added, C changed, D removed")
    diff.add_argument("image", metavar="IMAGE")
    diff.add_argument("base", nargs="?", metavar="BASE", help="over this image (its own layers)")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    verbs: dict[str, Verb] = {
        "pull": _pull,
        "push": _push,
        "login": _login,
        "ls": image_show.listing,
        "inspect": image_show.inspect,
        "history": image_show.history,
        "diff": image_show.diff,
        "build": image_make.build,
        "create": image_make.create,
        "import": _import,
        "export": _export,
        "tag": _tag,
        "rm": _remove,
        "prune": _prune,
    }
    return verbs[args.action](Store(), args)


def _pull(store: Store, args: argparse.Namespace) -> int:
    for name in args.images:
        with Bars(quiet=args.quiet) as bars:
            image = store.pull(
                name,
                platform=args.platform,
                plain_http=args.plain_http,
                progress=bars,
            )
        if args.unpack:
            store.rootfs(image).close()
        if not args.quiet:
            print(f"{image_show.familiar(image.name)}: {bars.summary()}", file=sys.stderr)
        print(image.target.digest)
    return 0


def _push(store: Store, args: argparse.Namespace) -> int:
    with Bars(quiet=args.quiet) as bars:
        digest = store.push(
            args.image,
            args.destination,
            plain_http=args.plain_http,
            progress=bars,
        )
    if not args.quiet:
        print(f"{args.destination or args.image}: {bars.summary()}", file=sys.stderr)
    print(digest)
    return 0


def _login(_: Store, args: argparse.Namespace) -> int:
    import getpass  # noqa: PLC0415 - only this verb needs it

    from ringfence.image.credentials import keep_credentials  # noqa: PLC0415

    if args.password_stdin:
        if not args.username:
            msg = "--password-stdin needs --username"
            raise ConfigError(msg)
        password = sys.stdin.readline().rstrip("\n")
        username = args.username
    else:
        username = args.username or input("Name: ")
        password = getpass.getpass("Password: ")
    path = keep_credentials(args.registry, username, password)
    print(f"kept in {path}, readable by you alone", file=sys.stderr)
    return 0


def _import(store: Store, args: argparse.Namespace) -> int:
    from ringfence.image.archives import import_images  # noqa: PLC0415 - only this verb needs it

    source = sys.stdin.buffer if args.source == "-" else Path(args.source)
    for tag in import_images(store, source, args.name):
        if args.unpack:
            store.rootfs(store.load(tag.target, tag.name)).close()
        print(tag.name if tag.dangling else image_show.familiar(tag.name))
    return 0


def _export(store: Store, args: argparse.Namespace) -> int:
    from ringfence.image.export import ArchiveFormat, export_images  # noqa: PLC0415

    archive = ArchiveFormat(args.archive)
    if args.output == "-":
        if archive is ArchiveFormat.OCI or sys.stdout.isatty():
            msg = "the image would be written to the terminal, or is a directory"
            raise ConfigError(msg, hint="say where to: --output PATH")
        export_images(store, args.images, sys.stdout.buffer, archive)
        sys.stdout.buffer.flush()
    else:
        export_images(store, args.images, Path(args.output), archive)
    return 0


def _tag(store: Store, args: argparse.Namespace) -> int:
    store.tag(args.image, args.name)
    return 0


def _remove(store: Store, args: argparse.Namespace) -> int:
    for name in args.images:
        print(image_show.familiar(store.remove(name)))
    return 0


def _prune(store: Store, args: argparse.Namespace) -> int:
    done = store.prune(every=args.all)
    for name in done.names:
        print(name)
    print(f"{done.blobs} blobs ({output.size(done.size)}), {done.layers} unpacked layers")
    return 0

"""``ringfence image ls|inspect|history|diff``: what there is."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.errors import RingfenceError
from ringfence.image.references import Reference

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from ringfence.image.config import History
    from ringfence.image.store import Image, Store

__all__ = ["diff", "history", "inspect", "listing"]


def familiar(name: str) -> str:
    """A name as people write it."""
    return "<none>" if name.startswith("sha256:") else Reference.parse(name).familiar


def listing(store: Store, args: argparse.Namespace) -> int:
    """Lists the names."""
    rows: list[tuple[str, ...]] = []
    found: list[dict[str, object]] = []
    for tag in store.tags:
        try:
            image = store.load(tag.target, tag.name)
        except RingfenceError as error:
            rows.append((familiar(tag.name), "-", "-", "-", "-", error.message))
            continue
        if args.quiet:
            print(image.id.short if args.quiet == 1 else image.id)
            continue
        found.append(
            {
                "name": tag.name,
                "id": str(image.id),
                "digest": str(tag.target.digest),
                "platform": str(image.config.platform),
                "created": image.config.created,
                "size_bytes": image.size,
                "layers": len(image.manifest.layers),
            },
        )
        created = _ago(image.config.created)
        rows.append(
            (
                familiar(tag.name),
                image.id.short,
                str(image.config.platform),
                str(len(image.manifest.layers)),
                output.size(image.size),
                created,
            ),
        )
    if args.quiet:
        return 0
    if args.format == "json":
        output.print_json(found)
    else:
        output.print_table(("NAME", "ID", "PLATFORM", "LAYERS", "SIZE", "CREATED"), rows)
    return 0


def _ago(created: str) -> str:
    try:
        when = dt.datetime.fromisoformat(created)
    except ValueError:
        return "-"
    return output.ago(when.timestamp()) if when.timestamp() > 0 else "-"


def inspect(store: Store, args: argparse.Namespace) -> int:
    """Prints images as JSON."""
    found = []
    for name in args.images:
        image = store.get(name, platform=args.platform)
        if args.raw:
            print(store.blobs.read(image.target.digest).decode())
            continue
        found.append(
            {
                "name": image.name,
                "id": str(image.id),
                "digest": str(image.digest),
                "media_type": image.manifest.media_type,
                "size_bytes": image.size,
                "layers": [layer.to_json() for layer in image.manifest.layers],
                "config": json.loads(store.blobs.read(image.id)),
            },
        )
    if not args.raw:
        output.print_json(found)
    return 0


def _steps(image: Image) -> Iterable[tuple[History, int]]:
    """Each step with the size of the layer that it made."""
    layers = iter(image.manifest.layers)
    for step in image.config.history:
        layer = None if step.empty_layer else next(layers, None)
        yield step, layer.size if layer is not None else 0


def history(store: Store, args: argparse.Namespace) -> int:
    """Prints how an image came about, the last step first."""
    image = store.get(args.image)
    steps = list(_steps(image))[::-1]
    if args.format == "json":
        output.print_json([{**step.to_json(), "size_bytes": size} for step, size in steps])
        return 0
    rows = []
    for step, size in steps:
        by = " ".join(step.created_by.split())
        if not args.no_trunc and len(by) > 70:
            by = by[:69] + "…"
        rows.append((_ago(step.created), output.size(size), by, step.comment))
    output.print_table(("CREATED", "SIZE", "BY", "COMMENT"), rows)
    return 0


def diff(store: Store, args: argparse.Namespace) -> int:
    """Prints what an image changes over another, or its last layer over the rest."""
    from ringfence.image.changes import image_changes  # noqa: PLC0415 - only this verb needs it

    base = store.get(args.base) if args.base else None
    for change in image_changes(store, store.get(args.image), base):
        print(f"{change.kind.value} {change.path}")
    return 0

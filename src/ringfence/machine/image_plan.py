"""What an image says about its machines, and its layers as the parts of a shared tree."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, NotFoundError
from ringfence.guest.spec import LayerKind, LayerSpec, RootSpec
from ringfence.image import Store

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ringfence.image import Image
    from ringfence.machine.document import Document, Json
    from ringfence.machine.phases import Phases
    from ringfence.machine.spec import ImageRoot, MachineSpec

__all__ = ["add_image", "find", "with_defaults"]


def find(root: ImageRoot, phases: Phases) -> Image:
    """The image, from the store, else from its registry.

    Raises:
        NotFoundError: Neither has it.
        RingfenceError: The registry can't be reached or refuses.
    """
    store = Store()
    try:
        return store.get(root.reference)
    except NotFoundError:
        with phases.measure("image pull"):
            return store.pull(root.reference)


def with_defaults(
    spec: MachineSpec, image: Image, command: tuple[str, ...]
) -> tuple[MachineSpec, tuple[str, ...]]:
    """The specification with what the image says where nothing else was said, and the command.

    As OCI runtimes have it: the entry point comes before what is given; what is given takes the
    place of the image's arguments.
    """
    config = image.config
    env = dict(line.partition("=")[::2] for line in config.env)
    filled = dataclasses.replace(
        spec,
        env={**env, **spec.env},
        workdir=spec.workdir or config.workdir,
        user=spec.user or config.user,
    )
    entry = config.entrypoint if spec.entrypoint is None else spec.entrypoint
    # Another entry point makes the image's arguments meaningless.
    arguments = command or (config.cmd if spec.entrypoint is None else ())
    return filled, (*entry, *arguments)


def add_image(document: Document, root: ImageRoot, tag: str, stack: ExitStack) -> RootSpec:
    """Adds one device that shares all layers of the image.

    Args:
        document: Gets it.
        root: The image, which is in the store.
        tag: What the guest mounts it by.
        stack: Holds the layers until the machine has ended.

    Raises:
        ConfigError: The image is for another kind of processor.
    """
    store = Store()
    image = store.get(root.reference)
    if image.config.platform.architecture != "amd64":
        message = f"the image {root.reference} is for {image.config.platform}, not linux/amd64"
        raise ConfigError(message)
    tree = stack.enter_context(store.rootfs(image))
    # Root keeps the files' owners; an ordinary user's store can't, and all are root's.
    ids = "host" if os.geteuid() == 0 else "squash:0:0"
    entries: list[Json] = []
    layers = []
    for number, path in enumerate(tree.layers):
        fd = document.give_file(path, os.O_RDONLY | os.O_DIRECTORY)
        entries.append({"path": f"l{number}", "fd": fd, "ids": ids, "cache": "always"})
        layers.append(LayerSpec(kind=LayerKind.VIRTIOFS, source=tag, subpath=f"/l{number}"))
    document.add_device("fs", tag=tag, entries=entries, xattrs="user")
    return RootSpec(layers=tuple(layers))

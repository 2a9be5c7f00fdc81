"""What an image says about its machines, and the image as a disk."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, NotFoundError
from ringfence.guest.spec import RootSpec
from ringfence.image import Store

if TYPE_CHECKING:
    from ringfence.image import Image
    from ringfence.machine.document import Document, Json
    from ringfence.machine.phases import Phases
    from ringfence.machine.spec import ImageRoot, MachineSpec

# The guest finds its root disk by this serial number.
_SERIAL = "root"

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


def add_image(document: Document, root: ImageRoot, limits: Json) -> RootSpec:
    """Adds the image as one read-only disk, under a writable layer in the guest's memory.

    A disk keeps the image's owners and device nodes whoever runs the machine, and is several times
    faster to walk than layers shared over virtio-fs (ADR 82).

    Args:
        document: Gets it.
        root: The image, which is in the store.
        limits: Of the disk, as its device has them.

    Raises:
        ConfigError: The image is for another kind of processor.
    """
    store = Store()
    image = store.get(root.reference)
    if image.config.platform.architecture != "amd64":
        message = f"the image {root.reference} is for {image.config.platform}, not linux/amd64"
        raise ConfigError(message)
    fd = document.give_file(store.disk(image))
    fixed: Json = {"format": "raw", "backing": [], "read_only": True, "serial": _SERIAL}
    document.add_device("block", fd=fd, **fixed, **limits)
    return RootSpec.block(f"serial:{_SERIAL}", "erofs")

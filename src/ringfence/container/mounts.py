"""Mounts of the runtime specification as the plan's: options become the kernel's bits."""

from __future__ import annotations

import os

from ringfence.container import flags
from ringfence.errors import ConfigError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringfence.container.fields import Fields

__all__ = ["compile_mount", "split_options"]

# Not the file system's and not the kernel's: said of the mount itself.
_OWN = ("bind", "rbind", "tmpcopyup", "idmap", "ridmap", "copy-symlink")


class Options:
    """A mount's options, sorted by who reads them."""

    __slots__ = (
        "attributes",
        "attributes_below",
        "bind",
        "copy_up",
        "data",
        "flags",
        "id_map",
        "id_map_below",
        "propagation",
        "recursive",
    )

    def __init__(self) -> None:
        self.flags = 0
        self.attributes = (0, 0)
        self.attributes_below = (0, 0)
        self.data: list[str] = []
        self.propagation: list[int] = []
        self.bind = self.recursive = self.copy_up = False
        self.id_map = self.id_map_below = False


def _change(now: tuple[int, int], bits: tuple[int, int]) -> tuple[int, int]:
    set_bits, clear_bits = bits
    return (now[0] & ~clear_bits) | set_bits, (now[1] & ~set_bits) | clear_bits


def split_options(options: Iterable[str]) -> Options:
    """Sorts a mount's options; what nobody knows is the file system's."""
    result = Options()
    for option in options:
        if option in flags.FILESYSTEM_FLAGS:
            set_bits, clear_bits = flags.FILESYSTEM_FLAGS[option]
            result.flags = (result.flags & ~clear_bits) | set_bits
            if option in flags.ATTRIBUTES:
                result.attributes = _change(result.attributes, flags.ATTRIBUTES[option])
        elif option in flags.PROPAGATION:
            result.propagation.append(flags.PROPAGATION[option])
        elif option in _OWN:
            result.bind = result.bind or option in {"bind", "rbind"}
            result.recursive = result.recursive or option == "rbind"
            result.copy_up = result.copy_up or option == "tmpcopyup"
            result.id_map = result.id_map or option in {"idmap", "ridmap"}
            result.id_map_below = result.id_map_below or option == "ridmap"
        elif option[:1] == "r" and option[1:] in flags.ATTRIBUTES:
            below = flags.ATTRIBUTES[option[1:]]
            result.attributes_below = _change(result.attributes_below, below)
        else:
            result.data.append(option)
    return result


def compile_mount(mount: Fields, bundle: str) -> dict[str, object]:
    """One mount of the specification as one of the plan.

    Args:
        mount: An entry of ``mounts``.
        bundle: What relative sources are relative to.

    Raises:
        ConfigError: It has no destination, or options that contradict each other.
    """
    target = mount.text("destination")
    if not target:
        message = f"{mount.place} has no destination"
        raise ConfigError(message)
    kind, source = mount.text("type"), mount.text("source")
    options = split_options(mount.texts("options"))
    result: dict[str, object] = {"target": target, "propagation": options.propagation}
    mapped = options.id_map or "uidMappings" in mount or "gidMappings" in mount
    if options.bind or kind == "bind":
        if not source:
            message = f"{mount.place} binds nothing: it has no source"
            raise ConfigError(message)
        result["source"] = source if source.startswith("/") else os.path.join(bundle, source)
        result["recursive"] = options.recursive
        result["set"], result["clear"] = options.attributes
        result["set_below"], result["clear_below"] = options.attributes_below
        if mapped:
            # For the runtime, which makes such mounts itself.
            result["id_map"] = {
                "recursive": options.id_map_below,
                **{name: mount.values.get(name) for name in ("uidMappings", "gidMappings")},
            }
        return result
    if mapped:
        message = f"{mount.place}: only what is bound can have ID maps"
        raise UnsupportedError(message)
    result["filesystem"] = kind
    result["source"] = source or kind
    result["flags"] = options.flags
    result["data"] = ",".join(options.data)
    result["copy_up"] = options.copy_up
    result["no_link"] = kind in {"proc", "sysfs"}
    return result

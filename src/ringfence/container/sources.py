"""Mounts that the runtime makes itself, for containers that couldn't: detached, given by descriptor.

A container with a user namespace of its own can't reach what only the host's root may enter, and
nobody inside may give a mount's owners other numbers.

Source: open_tree(2), mount_setattr(2); OCI runtime-spec, config.md "Mounts", ``idmap``.
"""

from __future__ import annotations

import os
import struct

from ringfence.container.fields import Fields
from ringfence.container.identity import Maps
from ringfence.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.spec import Bundle

__all__ = ["open_trees", "tree_of_owner"]

_OPEN_TREE, _MOUNT_SETATTR = 428, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_CLONE_TREE = 1 | os.O_CLOEXEC
_IDMAP = 0x10_0000
# The last number stands for none.
_ALL = 2**32 - 1
_CLONE_NEWUSER = 0x1000_0000


def open_trees(plan: dict[str, object], bundle: Bundle) -> list[int]:
    """Makes the mounts of a plan that need it; returns their descriptors, for the caller to close.

    Raises:
        ConfigError: A mount is to have ID maps and there are none.
        HostError: The kernel refused.
    """
    root = plan["root"]
    table = root.get("mounts") if isinstance(root, dict) else None
    others = "user" in bundle.namespaces and os.geteuid() == 0
    opened: list[int] = []
    try:
        for mount in table if isinstance(table, list) else []:
            wanted = mount.pop("id_map", None)
            if mount.get("filesystem") is not None or not (others or wanted is not None):
                continue
            tree = _open_tree(mount["source"], recursive=mount["recursive"])
            opened.append(tree)
            if wanted is not None:
                _map(tree, Fields(wanted, f"the mount {mount['target']}"), bundle)
            mount["tree"] = tree
    except BaseException:
        for number in opened:
            os.close(number)
        raise
    return opened


def tree_of_owner(source: str, user: int, group: int) -> int:
    """A mount of a directory or file in which root's are a user's, and the user's root's.

    Raises:
        HostError: The kernel or the file system can't.
    """
    tree = _open_tree(source, recursive=True)
    try:
        namespace = _namespace(Maps(_exchanged(user), _exchanged(group)))
        try:
            _set_owners(tree, namespace, _AT_EMPTY_PATH | _AT_RECURSIVE, source)
        finally:
            os.close(namespace)
    except BaseException:
        os.close(tree)
        raise
    return tree


def _exchanged(number: int) -> list[tuple[int, int, int]]:
    """A map of all numbers to themselves, but for 0 and one other."""
    if number == 0:
        return [(0, 0, _ALL)]
    between, above = number - 1, _ALL - number - 1
    ranges = [(0, number, 1), (1, 1, between), (number, 0, 1), (number + 1, number + 1, above)]
    return [entry for entry in ranges if entry[2] > 0]


def _call(what: str, number: int, *arguments: object) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        message = f"{what}: {os.strerror(code)}"
        raise HostError(message, errno=code)
    return result


def _open_tree(source: str, *, recursive: bool) -> int:
    flags = _CLONE_TREE | (_AT_RECURSIVE if recursive else 0)
    path = os.fsencode(source)
    return _call(f"cannot bind {source}", _OPEN_TREE, _AT_FDCWD, path, flags)


def _map(tree: int, wanted: Fields, bundle: Bundle) -> None:
    """Gives a mount the owners that a configuration says."""
    own = Maps.of(wanted)
    path = bundle.namespaces.get("user", "")
    if not own.users and path:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    else:
        maps = own if own.users else Maps.of(bundle.linux)
        if not maps.users or not maps.groups:
            message = f"{wanted.place} is to have ID maps, and neither it nor the container has any"
            raise ConfigError(message)
        namespace = _namespace(maps)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if wanted.flag("recursive") else 0)
    try:
        _set_owners(tree, namespace, flags, wanted.place)
    finally:
        os.close(namespace)


def _set_owners(tree: int, namespace: int, flags: int, place: str) -> None:
    import ctypes

    # To set, to clear, the propagation, the user namespace.
    attributes = struct.pack("4Q", _IDMAP, 0, 0, namespace)
    _call(
        f"cannot map the owners of {place}",
        _MOUNT_SETATTR,
        tree,
        b"",
        flags,
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


def _namespace(maps: Maps) -> int:
    """A descriptor of a user namespace with these maps, in which nobody is."""
    import ctypes

    theirs, ours = os.pipe2(os.O_CLOEXEC)
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        done = ctypes.CDLL(None).unshare(_CLONE_NEWUSER) == 0
        os.write(told, b"1" if done else b"0")
        os.read(theirs, 1)
        os._exit(0)
    try:
        os.close(theirs)
        os.close(told)
        if os.read(ready, 1) != b"1":
            message = "this host allows no user namespaces, which ID maps of mounts are made of"
            raise HostError(message)
        maps.write(pid)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.close(ours)
        os.waitpid(pid, 0)

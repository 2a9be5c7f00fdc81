"""The host's own programs as a guest's root file system, without what is nobody else's business.

The tree is put together by name: ``/usr`` and the directories that belong to it, and ``/etc``
without secrets. What isn't named doesn't exist in the guest: home directories, ``/root``, ``/run``,
``/var``, ``/tmp``, ``/proc``, ``/sys``, ``/dev``, ``/boot``. Sockets and device nodes are never
served, wherever they lie.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ringfence.machine.document import Document, Json

__all__ = ["entries", "hidden_in_etc", "passwd_lines"]

# With /usr merged (the file system hierarchy of all current distributions) these are links.
_PROGRAM_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")

# Directories that programs expect, empty. (The agent makes /tmp, which anybody may write.)
_EMPTY = (
    "dev", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys",
    "var/cache", "var/lib", "var/lock", "var/log", "var/spool", "var/tmp",
)  # fmt: skip

# Below /etc. What only root may read is hidden besides, whatever its name.
_SECRETS = frozenset(
    {
        "NetworkManager/system-connections", "apt/auth.conf", "apt/auth.conf.d", "ceph", "cni",
        "containerd", "containers", "crictl.yaml", "cryptsetup-keys.d", "crypttab", "docker",
        "exports", "fstab", "group-", "gshadow", "gshadow-", "ipsec.d", "ipsec.secrets", "iscsi",
        "ipa", "keys", "krb5.keytab", "krb5kdc", "kubernetes", "letsencrypt", "luks", "netplan",
        "openvpn", "passwd-", "pki/private", "pki/tls/private", "ppp", "rancher", "samba", "security/opasswd", "shadow", "shadow-",
        "ssh", "ssl/private", "sssd", "subgid", "subgid-", "subuid", "subuid-", "sudoers",
        "sudoers.d", "sudo.conf", "wireguard", "wpa_supplicant",
    }
)  # fmt: skip

# The guest gets its own of these.
_OWN = frozenset(
    {".pwd.lock", "group", "hostname", "hosts", "machine-id", "mtab", "passwd", "resolv.conf"}
)

# Ours take their place.
_GENERATED = frozenset({"group", "machine-id", "mtab", "passwd"})

# The first ID of people's accounts (login.defs, UID_MIN), and of nobody.
_FIRST_PERSON = 1000
_NOBODY = 65534


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    name: str
    number: int
    line: str


def entries(
    document: Document, folder: Path, *, etc: Path = Path("/etc"), root: Path = Path("/")
) -> list[Json]:
    """The entries of the virtio-fs device for the host's root, with their descriptors handed over.

    Args:
        document: Gets the descriptors.
        folder: Where the files are made that take the host's place.
        etc: The directory that becomes ``/etc``.
        root: Whose ``usr``, ``bin`` and so on are shared.

    Raises:
        HostError: One of them can't be opened.
    """
    found: list[Json] = [_share(document, "usr", root / "usr", hide=_unreadable_top(root / "usr"))]
    for name in _PROGRAM_DIRECTORIES:
        path = root / name
        if path.is_symlink():
            found.append({"path": name, "symlink": str(path.readlink())})
        elif path.is_dir():
            found.append(_share(document, name, path, hide=[]))
    found.append(_share(document, "etc", etc, hide=sorted(hidden_in_etc(etc))))
    generated = {
        "passwd": "".join(passwd_lines(etc / "passwd")),
        "group": "".join(group_lines(etc / "group")),
        "machine-id": "",
    }
    for name, text in generated.items():
        fd = document.give_text(folder / name, text)
        found.append({"path": f"etc/{name}", "fd": fd, "ids": "squash:0:0", "cache": "always"})
    found.append({"path": "etc/mtab", "symlink": "../proc/self/mounts"})
    found.append({"path": "var/run", "symlink": "/run"})
    found += [{"path": name, "directory": True} for name in _EMPTY]
    return found


def _share(document: Document, at: str, path: Path, *, hide: list[str]) -> Json:
    fd = document.give_file(path, os.O_RDONLY | os.O_DIRECTORY)
    # Packages rarely change while a machine lives, and then by new files in the old ones' place:
    # the guest may remember what it was told.
    return {"path": at, "fd": fd, "ids": "squash:0:0", "cache": "always", "hide": hide}


def _unreadable_top(usr: Path) -> list[str]:
    """What lies right below ``/usr`` and isn't for everybody."""
    with os.scandir(usr) as found:
        hidden = {entry.name for entry in found if not _is_for_everybody(entry)}
    # Where administrators keep the settings of their own programs.
    return sorted({*hidden, "local/etc"}) if "local" not in hidden else sorted(hidden)


def hidden_in_etc(etc: Path) -> set[str]:
    """Paths below ``/etc`` that a guest doesn't see: secrets, and what only some may read.

    A VM process that root started could read everything; it shows what any user may read.
    """
    found = {*_SECRETS, *_OWN, *_restricted(etc, "")} - _GENERATED
    return {path for path in found if not _lies_below(path, found)}


def _lies_below(path: str, others: set[str]) -> bool:
    parts = path.split("/")
    return any("/".join(parts[:count]) in others for count in range(1, len(parts)))


def _restricted(folder: Path, below: str) -> Iterator[str]:
    """What below a directory isn't readable by everybody, as paths from the top."""
    try:
        with os.scandir(folder) as found:
            children = list(found)
    except OSError:
        return
    for entry in children:
        path = f"{below}{entry.name}"
        if not _is_for_everybody(entry):
            yield path
        elif path not in _SECRETS and entry.is_dir(follow_symlinks=False):
            yield from _restricted(Path(entry.path), f"{path}/")


def _is_for_everybody(entry: os.DirEntry[str]) -> bool:
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError:
        return False
    if stat.S_ISLNK(mode):
        return True
    needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
    return mode & needed == needed


def _accounts(path: Path) -> Iterator[_Account]:
    try:
        text = path.read_text(errors="surrogateescape")
    except OSError:
        return
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and fields[2].isdigit():
            yield _Account(name=fields[0], number=int(fields[2]), line=line)


def _is_of_the_system(account: _Account) -> bool:
    return account.number < _FIRST_PERSON or account.number == _NOBODY


def passwd_lines(path: Path = Path("/etc/passwd")) -> list[str]:
    """The accounts of the system as a guest sees them: no people, no passwords.

    Their names are a host's business too; programs need those of the system.
    """
    lines = []
    for account in _accounts(path):
        fields = account.line.split(":")
        if _is_of_the_system(account) and len(fields) == 7:
            fields[1] = "x"
            lines.append(":".join(fields) + "\n")
    if not any(line.startswith("root:") for line in lines):
        lines.insert(0, "root:x:0:0:root:/root:/bin/sh\n")
    return lines


def group_lines(path: Path = Path("/etc/group")) -> list[str]:
    """The groups of the system as a guest sees them: without members."""
    accounts = filter(_is_of_the_system, _accounts(path))
    lines = [f"{account.name}:x:{account.number}:\n" for account in accounts]
    if not any(line.startswith("root:") for line in lines):
        lines.insert(0, "root:x:0:\n")
    return lines

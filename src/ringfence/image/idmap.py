"""Unpacking with the owners that an image says, without root: in a user namespace of subordinate IDs.

User 0 inside is this user; those from 1 on are the ones that ``/etc/subuid`` and ``/etc/subgid``
give to this user. Containers of this user have the same map, so they see the image's owners.

Source: user_namespaces(7), newuidmap(1), subuid(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import FormatError, HostError
from ringfence.image import jsonio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.image.jsonio import Json, JsonObject

__all__ = ["SubordinateIds", "run_mapped"]

_CLONE_NEWUSER = 0x10000000
_PACKAGES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubordinateIds:
    """The ranges that the host has given to this user.

    Args:
        users: First number and count.
        groups: Likewise.
    """

    users: tuple[int, int]
    groups: tuple[int, int]

    @classmethod
    def of_this_user(cls) -> SubordinateIds | None:
        """Those of this user; None where there are none, or nothing to map them with."""
        if shutil.which("newuidmap") is None or shutil.which("newgidmap") is None:
            return None
        users, groups = _range(Path("/etc/subuid")), _range(Path("/etc/subgid"))
        if users is None or groups is None:
            return None
        return cls(users=users, groups=groups)


def _range(path: Path) -> tuple[int, int] | None:
    names = {str(os.geteuid())}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(os.geteuid()).pw_name)
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split(":")
        if len(fields) == 3 and fields[0] in names and fields[1].isdigit() and fields[2].isdigit():
            return int(fields[1]), int(fields[2])
    return None


def run_mapped(ids: SubordinateIds, request: Mapping[str, Json]) -> JsonObject:
    """Do something as root of a user namespace, in a process of its own.

    Args:
        ids: Who else there is in it.
        request: What `ringfence.image.mapped` is to do.

    Returns:
        Its answer.

    Raises:
        FormatError: What it was given is malformed.
        HostError: It failed, or the host refused the map.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PACKAGES), *sys.path[1:]])}
    with subprocess.Popen(
        [sys.executable, "-m", "ringfence.image.mapped", json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as child:
        try:
            # Its first line says that the namespace is there.
            if child.stdout is not None and child.stdout.readline() == b"ready\n":
                _map("newuidmap", child.pid, os.geteuid(), ids.users)
                _map("newgidmap", child.pid, os.getegid(), ids.groups)
            out, err = child.communicate(b"go\n")
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        said = err.decode(errors="replace").strip().rpartition("\n")[2]
        msg = f"unpacking in a user namespace failed: {said or f'status {child.returncode}'}"
        raise HostError(msg, hint="see that unprivileged user namespaces are allowed")
    answer = jsonio.load(out, "the answer from the user namespace")
    refused = jsonio.text(answer, "refused", "answer", "")
    if refused:
        raise FormatError(refused)
    return answer


def _map(program: str, pid: int, own: int, given: tuple[int, int]) -> None:
    first, count = given
    words = [program, str(pid), "0", str(own), "1", "1", str(first), str(count)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        msg = f"{program} refused the map: {done.stderr.strip()}"
        hint = "look at /etc/subuid and /etc/subgid: the ranges must be given to this user"
        raise HostError(msg, hint=hint)


def enter() -> None:
    """Enter a new user namespace and wait until it has its map; for the process of its own.

    Raises:
        OSError: The kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no user namespace: {os.strerror(number)}")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline() != "go\n":
        raise OSError(0, "whoever asked has gone")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)

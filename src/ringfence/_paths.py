"""Where Ringfence keeps its files: the XDG base directories, or all below one of your choice.

``RINGFENCE_HOME`` replaces all of them, for tests and for trying things out.

Source: XDG Base Directory Specification 0.8.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ringfence.errors import HostError

__all__ = ["cache_dir", "config_dir", "data_dir", "runtime_dir", "state_dir"]


def _base(own: str, variable: str, default: str) -> Path:
    home = os.environ.get("RINGFENCE_HOME")
    if home:
        return Path(home).absolute() / own
    # The specification: a relative path in a variable is to be ignored.
    given = os.environ.get(variable, "")
    base = Path(given) if given.startswith("/") else Path.home() / default
    return base / "ringfence"


def cache_dir() -> Path:
    """What can be fetched or made again: kernels, initramfs, layers."""
    return _base("cache", "XDG_CACHE_HOME", ".cache")


def config_dir() -> Path:
    """What you write: settings, credentials for registries."""
    return _base("config", "XDG_CONFIG_HOME", ".config")


def data_dir() -> Path:
    """What can't be fetched again: images that were built, disks."""
    return _base("data", "XDG_DATA_HOME", ".local/share")


def state_dir() -> Path:
    """What is known of machines and networks, and their logs."""
    return _base("state", "XDG_STATE_HOME", ".local/state")


def runtime_dir() -> Path:
    """Sockets of running machines; made when missing, for this user alone.

    Raises:
        HostError: It can't be made, or belongs to somebody else.
    """
    if os.environ.get("RINGFENCE_HOME") or os.environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        path = _base("run", "XDG_RUNTIME_DIR", ".cache")
    else:
        path = Path(f"/tmp/ringfence-{os.geteuid()}")  # noqa: S108 - its owner is checked below
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        message = f"cannot make the directory for sockets {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(path)) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        message = f"{path} belongs to another user, so sockets in it can't be trusted"
        hint = "set XDG_RUNTIME_DIR to a directory of your own"
        raise HostError(message, hint=hint, path=str(path))
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path

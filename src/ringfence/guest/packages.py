"""The distribution's kernel package, had without root and verified by its package manager.

Debian and its relatives: apt resolves and verifies, dpkg-deb unpacks. Others are refused with what to
do instead; each needs no more than the two functions here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from ringfence.errors import HostError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["current_kernel_package", "unpack_kernel"]

# The smallest kernels that have the virtio drivers: Debian's, then Ubuntu's.
_KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64")
_TIMEOUT_S = 600.0


def current_kernel_package() -> str:
    """The name of the package with the files, as ``linux-image-6.1.0-56-cloud-amd64``.

    Raises:
        UnsupportedError: There is no apt.
        HostError: apt knows none; its lists may be missing.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        message = "this host's distribution has no apt, so its kernel can't be fetched"
        hint = "give one: ringfence kernel import /path/to/vmlinuz --modules /lib/modules/VERSION"
        raise UnsupportedError(message, hint=hint)
    for name in _KERNELS:
        for package in _image_dependencies(name):
            return package
    message = f"apt knows none of {', '.join(_KERNELS)}"
    raise HostError(message, hint="as root: apt-get update")


def unpack_kernel(package: str, folder: Path) -> Path:
    """Downloads a kernel package and unpacks it below ``folder``; returns the tree's root.

    Raises:
        HostError: Downloading, verifying or unpacking failed.
    """
    downloads = folder / "download"
    downloads.mkdir()
    # apt drops to a user of its own when it runs as root.
    downloads.chmod(0o777)
    root = folder / "root"
    names = [package]
    modules = package.replace("linux-image-unsigned-", "linux-image-").replace(
        "linux-image-", "linux-modules-"
    )
    # Ubuntu keeps the modules in a package of their own.
    if modules in _depends(package):
        names.append(modules)
    _run("apt-get", "download", *names, cwd=downloads)
    for archive in sorted(downloads.glob("*.deb")):
        _run("dpkg-deb", "-x", str(archive), str(root))
    return root


def _image_dependencies(name: str) -> list[str]:
    """Image packages of a version that the package ``name`` stands for."""
    return [found for found in _depends(name) if re.match(r"linux-image-(unsigned-)?\d", found)]


def _depends(name: str) -> list[str]:
    try:
        output = _run("apt-cache", "depends", "--important", name)
    except HostError:
        # apt-cache fails on a name that it doesn't know.
        return []
    return re.findall(r"Depends: (\S+)", output)


def _run(*argv: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            argv, cwd=cwd, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        message = f"`{' '.join(argv)}` failed: {str(error.stderr).strip()}"
        raise HostError(message, hint="as root: apt-get update") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        message = f"`{' '.join(argv)}` failed: {error}"
        raise HostError(message) from error
    return done.stdout

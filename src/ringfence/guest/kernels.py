"""Guest kernels: found on this host, fetched from its distribution, or brought by the user.

In order: the one that is asked for, the cache, the host's ``/boot``, the distribution's package
(:mod:`ringfence.guest.packages`). The cache holds ``kernels/VERSION/{vmlinuz,vmlinux,config,modules,source}``: the image
as it came, and unpacked, which spares each start a tenth of a second.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from ringfence import _paths
from ringfence.errors import (
    ConfigError,
    FormatError,
    HostError,
    NotFoundError,
    RingfenceError,
)
from ringfence.guest import packages

__all__ = ["Kernel", "fetch", "find", "image_version", "import_kernel", "list_kernels"]

_log = logging.getLogger(__name__)

# Without these a kernel can't be spoken to, built in or as modules.
_NEEDED = ("virtio_pci", "vmw_vsock_virtio_transport")
_HINT_FETCH = "ringfence kernel fetch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel and its modules.

    Args:
        version: As ``uname -r`` says in the guest.
        image: A bzImage or an ELF image.
        modules: The ``lib/modules/VERSION`` directory; may be missing when all is built in.
        source: Where it comes from: ``cache (package NAME)``, ``boot``, ``path``.
    """

    version: str
    image: Path
    modules: Path
    source: str

    @property
    def packed(self) -> Path:
        """The image as it came, for programs that want a bzImage; ``image`` may be unpacked."""
        packed = self.image.with_name("vmlinuz")
        return packed if self.image.name == "vmlinux" and packed.is_file() else self.image


def find(choice: str | Path | None = None) -> Kernel:
    """The kernel to boot.

    Args:
        choice: A path to an image, or the version of one that is listed. None takes the newest of
            the cache, else of ``/boot``, else fetches the distribution's.

    Raises:
        NotFoundError: There is no such kernel.
        FormatError: The file is no kernel.
        HostError: Fetching failed.
        UnsupportedError: This distribution's kernels can't be fetched.
    """
    if isinstance(choice, Path) or (choice is not None and "/" in choice):
        return _from_path(Path(choice))
    kernels = list_kernels()
    if choice is None:
        return _unpacked(kernels[0] if kernels else fetch())
    for kernel in kernels:
        if kernel.version == choice:
            return _unpacked(kernel)
    message = f"there is no kernel {choice} in the cache or in /boot"
    hint = "give a path, or one of `ringfence kernel ls`, or run: " + _HINT_FETCH
    raise NotFoundError(message, hint=hint)


def fetch() -> Kernel:
    """Downloads the distribution's kernel package, without root, into the cache.

    Nothing is downloaded when the cache holds the package's current version.

    Raises:
        HostError: The package manager failed; the message says how.
        UnsupportedError: There is no way to fetch this distribution's kernel.
    """
    package = packages.current_kernel_package()
    for kernel in _cached():
        if kernel.source == f"cache (package {package})":
            return kernel
    with tempfile.TemporaryDirectory(dir=_made(_cache()), prefix=".fetch-") as temporary:
        # The package manager's own user writes the download there.
        Path(temporary).chmod(0o755)
        root = packages.unpack_kernel(package, Path(temporary))
        images = sorted((root / "boot").glob("vmlinuz-*"))
        if not images:
            message = f"package {package} holds no kernel in its boot directory"
            raise FormatError(message)
        version = images[-1].name.removeprefix("vmlinuz-")
        modules = next(
            (
                path
                for path in (root / "lib/modules" / version, root / "usr/lib/modules" / version)
                if path.is_dir()
            ),
            None,
        )
        return _keep(images[-1], modules, version, f"package {package}")


def list_kernels() -> list[Kernel]:
    """The kernels that need no download: the cache's, then ``/boot``'s; newest first of each."""
    return [*_cached(), *_boot(Path("/boot"), Path("/lib/modules"))]


def import_kernel(image: Path, *, modules: Path | None = None, version: str = "") -> Kernel:
    """Copies a kernel and its modules into the cache.

    Args:
        image: A bzImage or an ELF image.
        modules: Its ``lib/modules/VERSION`` directory, or ``lib/modules`` that has it. None looks
            beside the image and in ``/lib/modules``.
        version: As ``uname -r`` says; found in the image when empty.

    Raises:
        ConfigError: The version can't be found, or the directory of modules isn't one.
        FormatError: The file is no kernel.
    """
    found = _from_path(image, version=version, modules=modules)
    return _keep(found.image, found.modules, found.version, f"import {image.absolute()}")


def image_version(image: Path) -> str:
    """The version that an image says it is.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It is neither a bzImage nor an ELF image, or says no version.

    Source:
        Linux x86 boot protocol: ``header`` at 0x202, ``kernel_version`` at 0x20e.
    """
    try:
        with image.open("rb") as file:
            head = file.read(0x8000)
            if head[0x202:0x206] == b"HdrS":
                at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
                return _version_text(head[at : at + 256].split(b"\0")[0], image)
            if head[:4] == b"\x7fELF":
                match = re.search(rb"Linux version (\S+)", head + file.read())
                return _version_text(match.group(1) if match else b"", image)
    except FileNotFoundError as error:
        message = f"there is no kernel image {image}"
        raise NotFoundError(message) from error
    except OSError as error:
        message = f"cannot read the kernel image {image}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(image)) from error
    message = f"{image} is no kernel: it is neither a bzImage nor an ELF image"
    raise FormatError(message, hint="a distribution's kernel is called vmlinuz")


def _version_text(text: bytes, image: Path) -> str:
    match = re.match(rb"[0-9]+\.[0-9]+[-+.~\w]*", text)
    if match is None:
        message = f"{image} doesn't say which version it is"
        raise FormatError(message)
    return match.group().decode()


def _from_path(image: Path, *, version: str = "", modules: Path | None = None) -> Kernel:
    image = image.absolute()
    found = image_version(image)
    version = version or found
    if modules is not None:
        inner = modules / version
        modules = inner if inner.is_dir() else modules
        if not modules.is_dir():
            message = f"{modules} is no directory of modules"
            raise ConfigError(message, hint="it is called lib/modules/VERSION")
    else:
        modules = _modules_near(image, version)
    return Kernel(version=version, image=image, modules=modules, source="path")


def _modules_near(image: Path, version: str) -> Path:
    """Where the modules of an image are: as packages have them, else as the host does."""
    parents = image.parents
    above = parents[1] if len(parents) > 1 else parents[0]
    places = [
        image.parent / "modules",
        above / "lib/modules" / version,
        above / "usr/lib/modules" / version,
        Path("/lib/modules") / version,
    ]
    return next((path for path in places if path.is_dir()), places[-1])


def _cache() -> Path:
    return _paths.cache_dir() / "kernels"


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot make the cache directory {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(path)) from error
    return path


def _best_image(folder: Path) -> Path:
    unpacked = folder / "vmlinux"
    return unpacked if unpacked.is_file() else folder / "vmlinuz"


def _unpacked(kernel: Kernel) -> Kernel:
    """A kernel of the cache with its image unpacked, once, where that can be done."""
    folder = kernel.image.parent
    if kernel.image.name != "vmlinuz" or folder.parent != _cache():
        return kernel
    try:
        from ringfence._native.host import unpack_kernel  # noqa: PLC0415 - not at every start

        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as temporary:
            new = Path(temporary) / "vmlinux"
            if not unpack_kernel(kernel.image, new):
                return kernel
            new.rename(folder / "vmlinux")
    except (ImportError, OSError, RingfenceError) as error:
        # The VM process unpacks it at each start, and says what is wrong with it.
        _log.debug("the kernel %s stays packed: %s", kernel.version, error)
        return kernel
    return replace(kernel, image=folder / "vmlinux")


def _cached() -> list[Kernel]:
    kernels = []
    for source in _cache().glob("[0-9]*/source"):
        folder = source.parent
        kernels.append(
            Kernel(
                version=folder.name,
                image=_best_image(folder),
                modules=folder / "modules",
                source=f"cache ({source.read_text().strip()})",
            )
        )
    return sorted(kernels, key=_age, reverse=True)


def _boot(boot: Path, modules: Path) -> list[Kernel]:
    """The host's own kernels, as far as they may be read and can be guests."""
    kernels = []
    for image in boot.glob("vmlinuz-[0-9]*"):
        version = image.name.removeprefix("vmlinuz-")
        folder = modules / version
        if os.access(image, os.R_OK) and folder.is_dir() and _can_be_guest(folder):
            kernels.append(Kernel(version=version, image=image, modules=folder, source="boot"))
    return sorted(kernels, key=_age, reverse=True)


def _can_be_guest(modules: Path) -> bool:
    text = ""
    for name in ("modules.builtin", "modules.order"):
        path = modules / name
        if path.is_file():
            text += path.read_text(errors="replace").replace("-", "_")
    return all(f"/{name}.ko" in text for name in _NEEDED)


def _age(kernel: Kernel) -> list[tuple[int, str]]:
    """Sorts 6.1.0-9 before 6.1.0-10, and release candidates before what they became."""
    parts = re.split(r"(\d+)", kernel.version)
    return [(int(part), "") if part.isdigit() else (-1 - ("rc" in part), part) for part in parts]


def _keep(image: Path, modules: Path | None, version: str, source: str) -> Kernel:
    """Puts a kernel into the cache, whole or not at all."""
    target = _made(_cache()) / version
    with tempfile.TemporaryDirectory(dir=_cache(), prefix=".new-") as temporary:
        new = Path(temporary) / version
        new.mkdir()
        try:
            shutil.copyfile(image, new / "vmlinuz")
            config = image.parent / f"config-{version}"
            if config.is_file():
                shutil.copyfile(config, new / "config")
            if modules is not None and modules.is_dir():
                # The links point to where the kernel was built.
                ignore = shutil.ignore_patterns("build", "source")
                shutil.copytree(modules, new / "modules", symlinks=True, ignore=ignore)
            else:
                (new / "modules").mkdir()
        except (OSError, shutil.Error) as error:
            message = f"cannot copy kernel {version} into the cache {_cache()}: {error}"
            raise HostError(message, path=str(target)) from error
        (new / "source").write_text(source + "\n")
        old = Path(temporary) / "old"
        if target.exists():
            target.rename(old)
        new.rename(target)
    return Kernel(
        version=version,
        image=target / "vmlinuz",
        modules=target / "modules",
        source=f"cache ({source})",
    )

"""Base images without a registry: from a directory, a tar, this host's programs or debootstrap."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ringfence.errors import ConfigError, HostError, NotFoundError, UnsupportedError
from ringfence.image.compression import Decompressed, Peekable, compression_of
from ringfence.image.config import History, ImageConfig
from ringfence.image.layers import LayerWriter, MadeLayer
from ringfence.image.manifests import Descriptor, Manifest, MediaType
from ringfence.image.pack import PackOptions, pack_tree
from ringfence.image.platforms import Platform
from ringfence.image.tar import TarReader

if TYPE_CHECKING:
    from ringfence.image.store import Image, Store

__all__ = ["DEFAULT_PATH", "add_image", "created_now", "from_debootstrap", "from_directory",
           "from_host", "from_tar"]  # fmt: skip

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MIRROR = "http://deb.debian.org/debian"

# What debootstrap leaves that is a matter of chance, of this host, or fetched again anyway.
_DEBOOTSTRAP_LEFT = (
    b"var/cache/apt/", b"var/lib/apt/lists/", b"var/log/", b"var/cache/ldconfig/aux-cache",
    b"var/cache/debconf/", b"etc/machine-id", b"etc/resolv.conf", b"etc/hostname", b"dev/",
    b"proc/", b"sys/", b"run/", b"tmp/", b"debootstrap/",
)  # fmt: skip
_HOST_DIRECTORIES = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")


def created_now() -> tuple[str, int | None]:
    """The time for an image, and the latest that its files may have.

    ``SOURCE_DATE_EPOCH`` fixes both, for the same input to give the same image.

    Raises:
        ConfigError: It is no number of seconds.
    """
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    if fixed is None:
        return _rfc3339(dt.datetime.now(dt.UTC)), None
    if not fixed.isdigit():
        msg = f"SOURCE_DATE_EPOCH is {fixed!r}, not a number of seconds since 1970"
        raise ConfigError(msg)
    when = dt.datetime.fromtimestamp(int(fixed), dt.UTC)
    return _rfc3339(when), int(fixed) * 1_000_000_000


def _rfc3339(when: dt.datetime) -> str:
    return when.replace(microsecond=0).isoformat().replace("+00:00", "Z")


def add_image(
    store: Store,
    name: str | None,
    config: ImageConfig,
    layers: tuple[Descriptor, ...],
) -> Image:
    """Put an image of layers that are in the store under a name; call it in `Store.using`."""
    raw = config.dump()
    store.blobs.put(raw)
    manifest = Manifest.build(Descriptor.of(raw, MediaType.OCI_CONFIG), layers)
    tag = store.add(manifest, name)
    return store.load(tag.target, tag.name, config.platform)


def _base(
    store: Store,
    name: str,
    layer: MadeLayer,
    step: str,
    config: ImageConfig | None,
) -> Image:
    created, _ = created_now()
    config = config or ImageConfig(
        platform=Platform.host(),
        env=(DEFAULT_PATH,),
        cmd=("/bin/sh",),
    )
    config = dataclasses.replace(
        config,
        diff_ids=(layer.diff_id,),
        created=created,
        history=(History(created=created, created_by=step, comment="ringfence"),),
    )
    return add_image(store, name, config, (layer.blob,))


def from_directory(
    store: Store,
    folder: Path,
    name: str,
    *,
    config: ImageConfig | None = None,
) -> Image:
    """Make an image of a directory's files, with their owners.

    Args:
        store: Where to.
        folder: The root file system.
        name: What to call it.
        config: What to run in it; by default a shell.

    Raises:
        NotFoundError: There is no such directory.
        HostError: Something in it can't be read.
    """
    if not folder.is_dir():
        msg = f"there is no directory {folder}"
        raise NotFoundError(msg)
    _, latest_ns = created_now()
    with store.using(), LayerWriter(store) as writer:
        pack_tree(folder, writer.tar, PackOptions(latest_ns=latest_ns))
        return _base(store, name, writer.finish(), "files of a directory", config)


def from_tar(
    store: Store,
    source: Path | BinaryIO,
    name: str,
    *,
    config: ImageConfig | None = None,
) -> Image:
    """Make an image of a root file system's tar, compressed in any way or not.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It isn't a tar.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                return from_tar(store, file, name, config=config)
        except FileNotFoundError as error:
            msg = f"there is no {source}"
            raise NotFoundError(msg) from error
    with store.using(), LayerWriter(store) as writer:
        start = Peekable(source)
        with Decompressed(start, store.limits, compression_of(start.peek())) as pieces:
            reader = TarReader(pieces, store.limits)
            for entry in reader:
                if entry.sparse is not None:
                    msg = "the tar has sparse files"
                    raise UnsupportedError(msg, hint="pack it without --sparse")
                writer.tar.add(entry, reader.data())
        return _base(store, name, writer.finish(), "files of a tar", config)


def from_debootstrap(
    store: Store,
    suite: str,
    name: str,
    *,
    mirror: str = _MIRROR,
    packages: tuple[str, ...] = (),
) -> Image:
    """Make an image of a Debian or Ubuntu release.

    Args:
        store: Where to.
        suite: ``bookworm``, ``trixie``, ...
        name: What to call it.
        mirror: Where its packages are.
        packages: Further packages.

    Raises:
        UnsupportedError: debootstrap is missing, or this isn't root.
        HostError: debootstrap failed.
    """
    program = shutil.which("debootstrap")
    if program is None:
        msg = "debootstrap is not installed"
        raise UnsupportedError(msg, hint="apt install debootstrap")
    if os.geteuid() != 0:
        msg = "debootstrap needs root: it sets owners and runs the packages' scripts"
        raise UnsupportedError(msg, hint="sudo ringfence image create --debootstrap ...")
    _, latest_ns = created_now()
    with tempfile.TemporaryDirectory(dir=store.root / "tmp", prefix="debootstrap-") as work:
        folder = Path(work) / "root"
        command = [program, "--variant=minbase"]
        if packages:
            command.append(f"--include={','.join(packages)}")
        done = subprocess.run(
            [*command, suite, folder, mirror],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            msg = f"debootstrap of {suite} failed: {'; '.join(lines[-3:])}"
            raise HostError(msg, hint=f"see that {mirror} has {suite} and can be reached")
        options = PackOptions(
            latest_ns=latest_ns,
            exclude=lambda path: path.startswith(_DEBOOTSTRAP_LEFT),
        )
        with store.using(), LayerWriter(store) as writer:
            pack_tree(folder, writer.tar, options)
            return _base(store, name, writer.finish(), f"debootstrap {suite}", None)


def from_host(store: Store, name: str) -> Image:
    """Make an image of this host's own programs: ``/usr`` and what belongs to it.

    Of ``/etc`` only what programs need to run and every user may read; no accounts of people.

    Raises:
        HostError: Something can't be read.
    """
    _, latest_ns = created_now()
    with store.using(), LayerWriter(store) as writer:
        with tempfile.TemporaryDirectory(dir=store.root / "tmp", prefix="host-") as work:
            _skeleton(Path(work))
            pack_tree(Path(work), writer.tar, PackOptions(latest_ns=latest_ns, owner=(0, 0)))
        for folder in _HOST_DIRECTORIES:
            path = Path("/") / folder
            if path.is_dir() and not path.is_symlink():
                options = PackOptions(
                    prefix=folder.encode() + b"/", latest_ns=latest_ns, owner=(0, 0),
                    exclude=_Unreadable(path),
                )  # fmt: skip
                pack_tree(path, writer.tar, options)
        return _base(store, name, writer.finish(), "this host's programs", None)


class _Unreadable:
    """Says which names aren't for every user."""

    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)

    def __call__(self, name: bytes) -> bool:
        mode = os.lstat(self._root + b"/" + name).st_mode
        return not mode & 0o004


_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "nsswitch.conf", "os-release",
        "protocols", "services", "ssl/certs", "profile", "bash.bashrc", "terminfo", "debian_version",
        "java-17-openjdk", "python3", "perl", "localtime", "timezone")  # fmt: skip


def _skeleton(work: Path) -> None:
    """The directories and small files around the programs."""
    for name in ("dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp",
                 "var/cache", "var/lib", "var/log", "var/tmp"):  # fmt: skip
        (work / name).mkdir(parents=True)
    for name in _HOST_DIRECTORIES:
        path = Path("/") / name
        if path.is_symlink():
            (work / name).symlink_to(path.readlink())
        elif path.is_dir():
            (work / name).mkdir()
    for name in ("tmp", "var/tmp"):
        (work / name).chmod(0o1777)
    (work / "root").chmod(0o700)
    (work / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    )
    (work / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    for name in _ETC:
        source, target = Path("/etc") / name, work / "etc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.is_file():
            shutil.copy2(source, target, follow_symlinks=False)
        elif source.is_dir():
            shutil.copytree(source, target, symlinks=True)

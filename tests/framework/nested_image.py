"""The nested host's kernel and initramfs, from the distribution's own packages.

Nothing here needs root: packages are downloaded and verified by apt, unpacked by dpkg-deb, and the
initramfs is written by Python. All of it is cached and made anew only when a package changes.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"

# What the nested host loads, in its order; the modules these need are found in them.
MODULES = (
    *("virtio_pci", "virtio_console", "virtiofs", "overlay", "kvm-amd", "tun", "vhost_vsock"),
    *("loop", "ext4"),
    # What networks of the host's kernel take.
    *("bridge", "veth", "vhost_net", "nf_tables", "nft_chain_nat", "nft_masq", "nft_nat", "nft_ct"),
    *("nft_fib_inet", "nft_limit", "nft_reject_inet", "nft_meta_bridge", "nft_log"),
    *("nf_log_syslog", "nft_objref", "nft_redir", "nft_fib_ipv4", "nft_fib_ipv6"),
)

INIT = """\
#!/bin/busybox sh
# Mounts the outer host's files read only under a layer in memory, then hands over to the runner.
set -e
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules.order); do
    /bin/busybox insmod /modules/$module
done
/bin/busybox mount -t virtiofs -o ro outer /outer
/bin/busybox mount -t tmpfs -o mode=755 layer /layer
/bin/busybox mkdir /layer/upper /layer/work
/bin/busybox mount -t overlay -o lowerdir=/outer,upperdir=/layer/upper,workdir=/layer/work root /root
for place in proc sys dev; do
    /bin/busybox mount --move /$place /root/$place
done
for place in tmp run var/tmp dev/shm; do
    /bin/busybox mkdir -p /root/$place
    /bin/busybox mount -t tmpfs -o mode=1777 tmp /root/$place
done
if ! [ -e "/root$RUNNER" ]; then
    # The repository is in one of these.
    /bin/busybox mkdir -p "/root$REPOSITORY" /layer/repository/upper /layer/repository/work
    /bin/busybox mount -t overlay \
        -o "lowerdir=/outer$REPOSITORY,upperdir=/layer/repository/upper,workdir=/layer/repository/work" \
        repository "/root$REPOSITORY"
fi
/bin/busybox mkdir -p /root/dev/pts
/bin/busybox mount -t devpts pts /root/dev/pts
/bin/busybox ip link set lo up
/bin/busybox hostname nested
# The outer host's share is reached by the overlay alone.
/bin/busybox chroot /root "$PYTHON" -I "$RUNNER" || true
/bin/busybox poweroff -f
"""


class ArtifactError(RuntimeError):
    """A package that the nested host needs can't be had. The message says how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What QEMU boots.

    Args:
        kernel: The distribution's bzImage.
        initramfs: Busybox, modules and the init script.
    """

    kernel: Path
    initramfs: Path


def cache_dir() -> Path:
    """Where packages and images are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "ringfence" / "tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def prepare() -> Image:
    """Fetches what is missing and builds the initramfs.

    Raises:
        ArtifactError: A package can't be downloaded.
    """
    kernel, modules_root = distribution_kernel(KERNEL_PACKAGE)
    program = busybox()
    modules = load_order(modules_root, MODULES)
    key = hashlib.sha256(INIT.encode())
    for path in (program, *modules):
        key.update(f"{path}:{path.stat().st_size}\n".encode())
    initramfs = cache_dir() / f"initramfs-{key.hexdigest()[:16]}.gz"
    if not initramfs.exists():
        _write_whole(initramfs, gzip.compress(archive(program, modules), 1, mtime=0))
    return Image(kernel=kernel, initramfs=initramfs)


def distribution_kernel(package: str) -> tuple[Path, Path]:
    """A kernel's bzImage and its ``lib/modules`` folder, by the package that names the current version.

    Raises:
        ArtifactError: It can't be downloaded.
    """
    root = _unpacked(_versioned(package))
    return next((root / "boot").glob("vmlinuz-*")), root / "lib" / "modules"


def busybox() -> Path:
    """A static busybox.

    Raises:
        ArtifactError: It can't be downloaded.
    """
    return _unpacked(BUSYBOX_PACKAGE) / "bin" / "busybox"


def _versioned(package: str) -> str:
    """The package with the files, behind the one that names the current version."""
    output = _apt("apt-cache", "depends", package)
    match = re.search(r"Depends: (linux-image-\S+)", output)
    if match is None:
        message = f"{package} is not known to apt: run `apt-get update` as root first"
        raise ArtifactError(message)
    return match.group(1)


def _apt(*argv: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        message = f"`{' '.join(argv)}` failed (is `apt-get update` needed?): {detail.strip()}"
        raise ArtifactError(message) from error
    return done.stdout


def _unpacked(package: str) -> Path:
    """The files of a package, downloaded once."""
    kept = sorted(cache_dir().glob(f"{package}_*/.complete"))
    if kept:
        return kept[-1].parent
    with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
        folder = Path(temporary)
        # apt's own download user must be able to write there.
        folder.chmod(0o777)
        _apt("apt-get", "download", package, cwd=folder)
        archive_path = next(folder.glob("*.deb"))
        files = folder / "files"
        _apt("dpkg-deb", "-x", str(archive_path), str(files))
        (files / ".complete").touch()
        target = cache_dir() / archive_path.stem
        if not target.exists():
            shutil.move(files, target)
    return target


def load_order(root: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The module files for ``wanted``, each behind the modules it needs.

    Args:
        root: A ``lib/modules`` folder with one version in it.
        wanted: Module names, with ``-`` or ``_``.
    """
    files = {path.stem.replace("-", "_"): path for path in root.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        # A name without a file is built into the kernel.
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        match = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in match.group(1).decode().split(",") if match else []:
            add(needed)
        order.append(path)

    for name in wanted:
        add(name)
    return order


def archive(program: Path, modules: list[Path], init: str = INIT) -> bytes:
    """The initramfs in newc form (the kernel's early-userspace buffer format document)."""
    entries = [
        *((name, 0o040755, b"") for name in ("bin", "dev", "layer", "modules", "outer")),
        *((name, 0o040755, b"") for name in ("proc", "root", "sys")),
        ("init", 0o100755, init.encode()),
        ("bin/busybox", 0o100755, program.read_bytes()),
        ("modules.order", 0o100644, "\n".join(path.name for path in modules).encode()),
        *((f"modules/{path.name}", 0o100644, path.read_bytes()) for path in modules),
        ("TRAILER!!!", 0, b""),
    ]
    parts = [_member(inode, *entry) for inode, entry in enumerate(entries, start=1)]
    return b"".join(parts)


def _member(inode: int, name: str, mode: int, data: bytes) -> bytes:
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _write_whole(path: Path, data: bytes) -> None:
    """No other run may see half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).rename(path)

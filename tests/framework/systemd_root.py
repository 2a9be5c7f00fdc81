"""A Debian with systemd on a disk, as its installer would leave it, and what boots it from there.

The root is made by debootstrap and kept; each machine gets a copy. Beside Debian's own units there is one that
says on the serial console how the system is when it is up, and powers off.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.framework import nested_image

if TYPE_CHECKING:
    from pathlib import Path

RELEASE = "bookworm"
PACKAGES = ("systemd", "systemd-sysv", "dbus", "udev", "cron", "rsyslog", "openssh-server")
IMAGE_MIB = 1024
# A login there would hang up on the report.
CMDLINE = "console=ttyS0 quiet panic=-1 root=/dev/vda systemd.mask=serial-getty@ttyS0.service"
# The file system asks for its checksum by name.
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")

INIT = """\
#!/bin/busybox sh
# As an installed system's: the drivers of the disk, the disk, and its own init.
set -e
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules.order); do
    /bin/busybox insmod /modules/$module
done
until [ -b /dev/vda ]; do /bin/busybox usleep 10000; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""

REPORT = """\
[Unit]
Description=Say how the system is, and end it
After=multi-user.target

[Service]
Type=idle
StandardOutput=tty
TTYPath=/dev/ttyS0
ExecStart=/bin/sh -c 'echo "state: $(systemctl is-system-running --wait)"; \\
    systemctl --failed --plain --no-legend | sed "s/^/failed: /"; \\
    dmesg -l warn,err,crit,alert,emerg | sed "s/^/kernel: /"; \\
    echo "units: $(systemctl list-units --plain --no-legend --state=active | wc -l)"; \\
    echo "processors: $(nproc)"; echo report ends'
ExecStopPost=/bin/systemctl poweroff

[Install]
WantedBy=graphical.target
"""


def image() -> Path:
    """The disk; skips where it can't be made."""
    path = nested_image.cache_dir() / f"systemd-{RELEASE}.img"
    if path.exists():
        return path
    if os.geteuid() != 0 or shutil.which("debootstrap") is None or shutil.which("mke2fs") is None:
        pytest.skip("making a Debian root needs root, debootstrap and mke2fs")
    tree = path.with_suffix(".part")
    shutil.rmtree(tree, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE]
    subprocess.run([*command, tree], check=True, stdout=subprocess.DEVNULL)
    # The file is written as a guest's own: a root of nobody's machine has none of the host's names.
    (tree / "etc/hostname").write_text("installed\n")
    (tree / "etc/machine-id").write_text("uninitialized\n")
    unit = tree / "etc/systemd/system/report.service"
    unit.write_text(REPORT)
    wants = tree / "etc/systemd/system/graphical.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / unit.name).symlink_to(f"../{unit.name}")
    part = path.with_suffix(".new")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, part, f"{IMAGE_MIB}m"], check=True)
    shutil.rmtree(tree)
    part.rename(path)
    return path


def initramfs(modules: Path, folder: Path) -> Path:
    """What mounts the disk and starts its init, with the drivers of a kernel.

    Args:
        modules: The kernel's ``lib/modules/VERSION``.
        folder: Where it is written.
    """
    path = folder / "initramfs"
    order = nested_image.load_order(modules, MODULES)
    path.write_bytes(nested_image.archive(nested_image.busybox(), order, INIT))
    return path

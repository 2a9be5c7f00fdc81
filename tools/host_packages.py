"""The distribution packages that building, running and testing need: found, or installed by name.

    python3 tools/host_packages.py build test

A program that is there already counts, whoever installed it. As root, missing packages are installed with apt;
otherwise the exact command is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that has to be on the host.

    Args:
        package: Debian's package with it.
        program: A program of that package.
        path: A file of that package, where no program tells.
        why: What it is for.
    """

    package: str
    program: str = ""
    path: str = ""
    why: str

    def is_met(self) -> bool:
        """Whether the program or the file is there."""
        if self.path:
            return Path(self.path).exists()
        search = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
        return shutil.which(self.program, path=search) is not None


GROUPS: dict[str, tuple[Need, ...]] = {
    "build": (Need(package="build-essential", program="cc", why="the linker, for Rust"),),
    "demo": (),
    "test": (
        Need(
            package="qemu-system-x86", program="qemu-system-x86_64", why="the nested KVM test host"
        ),
        Need(
            package="qemu-system-common",
            path="/usr/lib/qemu/virtiofsd",
            why="the nested host's files",
        ),
        Need(package="qemu-utils", program="qemu-img", why="a second opinion on qcow2 images"),
        Need(package="e2fsprogs", program="mkfs.ext4", why="disk images with a file system"),
        Need(package="xfsprogs", program="mkfs.xfs", why="likewise"),
        Need(package="erofs-utils", program="mkfs.erofs", why="images that hold a layer"),
        Need(package="iproute2", program="ip", why="the networks' tests"),
        Need(package="nftables", program="nft", why="the networks' tests"),
        Need(package="dnsmasq-base", program="dnsmasq", why="networks of the host's kernel"),
        Need(package="iputils-ping", program="ping", why="the networks' tests"),
        Need(package="cpio", program="cpio", why="the witness of archives for the kernel"),
        Need(package="curl", program="curl", why="the networks' tests"),
        Need(package="xz-utils", program="xz", why="kernels compressed for the loader's tests"),
        Need(package="docker-registry", program="docker-registry", why="images pulled and pushed"),
        Need(package="skopeo", program="skopeo", why="a second opinion on images"),
        Need(package="umoci", program="umoci", why="a second opinion on images"),
        Need(package="podman", program="podman", why="a second opinion on images"),
        Need(package="containerd", program="containerd", why="an engine that calls the runtime"),
        Need(package="docker.io", program="dockerd", why="likewise"),
        Need(package="uidmap", program="newuidmap", why="users of rootless containers"),
        Need(package="debootstrap", program="debootstrap", why="base images"),
        Need(package="buildah", program="buildah", why="images with zstd layers"),
        Need(package="busybox-static", program="busybox", why="the base image of builds"),
    ),
    "soak": (
        Need(
            package="libpython3.11-testsuite",
            path="/usr/lib/python3.11/test/test_int.py",
            why="CPython's own tests",
        ),
    ),
    "bench": (
        Need(package="iperf3", program="iperf3", why="throughput of networks"),
        Need(package="slirp4netns", program="slirp4netns", why="the peer in networks"),
        Need(package="passt", program="pasta", why="likewise"),
        Need(package="qemu-system-x86", program="qemu-system-x86_64", why="the peer"),
        Need(package="busybox-static", program="busybox", why="the guests' shell"),
        Need(package="podman", program="podman", why="the peer in unpacking images"),
        Need(package="skopeo", program="skopeo", why="likewise"),
        Need(package="runc", program="runc", why="the peer in running bundles"),
        Need(package="umoci", program="umoci", why="likewise"),
        Need(package="debootstrap", program="debootstrap", why="the root of the whole programs"),
        Need(package="build-essential", program="cc", why="the guests' programs"),
    ),
}


def missing(groups: list[str]) -> list[Need]:
    """What the host lacks of these groups, each package once."""
    found: dict[str, Need] = {}
    for group in groups:
        for need in GROUPS[group]:
            if not need.is_met():
                found.setdefault(need.package, need)
    return list(found.values())


def install(packages: list[str]) -> int:
    """Installs packages with apt; refreshes its lists when they are of no use."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode == 0:
            return 0
    subprocess.run(["apt-get", "update"], env=environment, check=False)
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    """Sees to it that the groups' packages are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=sorted(GROUPS))
    lacking = missing(parser.parse_args().groups)
    if not lacking:
        return 0
    packages = [need.package for need in lacking]
    for need in lacking:
        sys.stderr.write(f"missing: {need.program or need.path} ({need.why})\n")
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        return install(packages)
    sys.stderr.write(f"This needs root. Run:\n\n    sudo {command}\n\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

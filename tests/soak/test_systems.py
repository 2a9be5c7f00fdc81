"""Whole systems under the ``bt`` engine: Debian's kernels and its service manager, as installed on a disk."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from ringfence import _binaries
from tests.framework import nested_image, systemd_root
from tests.framework.vm_process import VmProcess

if TYPE_CHECKING:
    from pathlib import Path

BOOT_TIMEOUT_S = 300.0
# The disk has no modules of the kernel: systemd says so in the kernel's log. The kernel tells of the faults of the host's processor.
EXPECTED = (
    *("systemd[1]: ", "systemd-gpt-auto-generator["),
    *("Speculative Return Stack Overflow", "/hw-vuln/"),
    # A vCPU's thread had to wait for the host.
    "hrtimer: interrupt took",
)


def _report(serial: str) -> dict[str, list[str]]:
    report: dict[str, list[str]] = {}
    for line in serial.splitlines():
        kind, separator, text = line.partition(": ")
        if separator and kind in {"state", "failed", "kernel", "units", "processors"}:
            report.setdefault(kind, []).append(text)
    return report


@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("package", ["linux-image-cloud-amd64", "linux-image-amd64"])
def test_an_installed_debian_comes_up_and_powers_off(
    tmp_path: Path, package: str, vcpus: int
) -> None:
    disk = tmp_path / "disk"
    shutil.copyfile(systemd_root.image(), disk)
    kernel, modules = nested_image.distribution_kernel(package)
    fd = os.open(disk, os.O_RDWR)
    try:
        with VmProcess(
            _binaries.find("ringfence-vm"),
            engine="bt",
            kernel=kernel,
            initramfs=systemd_root.initramfs(modules, tmp_path),
            cmdline=systemd_root.CMDLINE,
            memory_mib=512,
            vcpus=vcpus,
            devices=[
                {"type": "block", "fd": fd, "format": "raw", "serial": "root"},
                {"type": "rng"},
            ],
            descriptors=[fd],
        ) as vm:
            ended = vm.wait_exit(BOOT_TIMEOUT_S)
            serial = vm.serial()
    finally:
        os.close(fd)
    assert ended["reason"] == "poweroff", serial[-3000:]
    report = _report(serial)
    assert report.get("state") == ["running"], serial[-3000:]
    assert report.get("failed", []) == []
    assert report["processors"] == [str(vcpus)]
    said = [line for line in report.get("kernel", []) if not any(word in line for word in EXPECTED)]
    assert said == [], "\n".join(said)

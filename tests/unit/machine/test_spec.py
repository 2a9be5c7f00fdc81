"""What can be asked for, and what is refused at once."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from ringfence.errors import ConfigError
from ringfence.machine.options import MachineOptions, memory_mib, spec_from
from ringfence.machine.spec import DirectoryRoot, DiskRate, DiskRoot, HostRoot, ImageRoot, Mount


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vcpus": 0}, "1 to 32 vCPUs, not 0"),
        ({"vcpus": 33}, "not 33"),
        ({"vcpus": "2"}, "a whole number, not '2'"),
        ({"memory": 1.5}, "a whole number, not 1.5"),
        ({"memory": 8}, "at least 64 MiB"),
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"memory": "-1G"}, "not a size"),
        ({"huge_pages": "yes"}, "no huge pages 'yes'"),
        ({"engine": "warp"}, "no engine 'warp'"),
        ({"memory_mib": 512}, "no option 'memory_mib'"),
        ({"name": "a b"}, "not a name"),
        ({"name": "-x"}, "not a name"),
        ({"hostname": "under_score"}, "not a host name"),
        ({"workdir": "relative"}, "absolute path"),
        ({"env": {"A=B": "c"}}, "environment variable"),
        ({"mounts": ["/a"]}, "not a mount"),
        ({"mounts": ["/a:/b:rx"]}, "not a mount"),
        ({"mounts": ["/a:b"]}, "absolute path below /"),
        ({"mounts": ["/a:/b/../c"]}, "absolute path below /"),
        ({"mounts": ["/a:/"]}, "absolute path below /"),
        ({"mounts": ["/a:/x", "/b:/x"]}, "same target"),
        ({"image": "a", "root": "/b"}, "not both"),
        ({"disk": "/a"}, "never guessed"),
        ({"disk": "/a", "disk_format": "vmdk"}, "not a format"),
        ({"disk_format": "raw"}, "there is no disk"),
        ({"disk": "/a", "disk_format": "raw", "disk_partition": -1}, "partitions 1 to 255, not -1"),
        ({"disk": "/a", "disk_format": "raw", "disk_filesystem": "-o"}, "not the name of a file"),
        ({"disk": "/a", "disk_format": "raw", "disk_iops": 0}, "at least 1 a second"),
        ({"disk": "/a", "disk_format": "raw", "disk_bandwidth": "fast"}, "bytes a second"),
        ({"disk_bandwidth": "1M"}, "this machine has no disk"),
        ({"writable": True}, "can't be made writable"),
        ({"timeout_s": 0}, "more than 0 seconds"),
        ({"command_timeout_s": -1}, "more than 0 seconds"),
    ],
)
def test_what_is_not_possible_is_refused(options: MachineOptions, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_from(options)


@pytest.mark.parametrize(
    ("option", "hint"), [("cpus", "did you mean 'vcpus'"), ("zzz", "the options are allow, ")]
)
def test_an_unknown_option_gets_the_one_that_was_meant(option: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        spec_from({option: 1})  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "mib"), [("512", 512), ("512M", 512), ("2G", 2048), ("1.5GiB", 1536), ("65536k", 64)]
)
def test_sizes(text: str, mib: int) -> None:
    assert memory_mib(text) == mib


def test_roots() -> None:
    assert spec_from({}).root == HostRoot()
    assert spec_from({"image": "debian:12"}).root == ImageRoot(reference="debian:12")
    assert spec_from({"root": "/r", "writable": True}).root == DirectoryRoot(
        path=Path("/r"), writable=True
    )
    assert spec_from({"disk": "/d", "disk_format": "raw"}).root == DiskRoot(
        path=Path("/d"), format="raw"
    )


def test_a_disks_limits_and_place() -> None:
    options: MachineOptions = {
        "disk": "/d",
        "disk_format": "qcow2",
        "disk_partition": 3,
        "disk_filesystem": "xfs",
        "disk_bandwidth": "10M",
        "disk_iops": 100,
    }
    spec = spec_from(options)
    assert spec.disk_rate == DiskRate(bytes_per_s=10 << 20, requests_per_s=100)
    assert isinstance(spec.root, DiskRoot)
    assert (spec.root.partition, spec.root.filesystem) == (3, "xfs")


def test_a_mount_is_writable_unless_said() -> None:
    assert Mount.parse("/a:/b") == Mount(
        source=Path("/a"), target=PurePosixPath("/b"), read_only=False
    )
    assert Mount.parse("/a:/b:ro").read_only
    assert Mount.parse("sub:/b").source == Path.cwd() / "sub"

"""A card whose instances of vhost-net can't be used is served all the same."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ringfence.network import links
from tests.framework.programs import vm_testing_program, write_minimal_kernel
from tests.framework.vm_process import VmProcess

pytestmark = [pytest.mark.root]

MAC = "02:00:00:00:00:01"


def nulls(pid: int) -> int:
    """How many descriptors of /dev/null a process or one of its children has open, at most."""
    found = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        # Some are closed meanwhile.
        with suppress(OSError):
            found += file.readlink() == Path("/dev/null")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max([found, *(nulls(int(child)) for child in children)])


def test_an_engine_that_must_hear_of_writes_has_its_frames_moved_here(tmp_path: Path) -> None:
    kernel = write_minimal_kernel(tmp_path / "kernel")
    links.ensure_bridge("rfvhost0", [], 1500)
    try:
        taps = links.add_tap("rfvhost1", "rfvhost0", 1500, queues=2)
        # Whatever they are: this engine's are closed unseen.
        given = [os.open("/dev/null", os.O_RDWR) for _ in taps]
        fds = [*taps, *given]
        device: dict[str, object] = {
            "type": "net", "tap_fds": taps, "vhost_fds": given, "mac": MAC, "lock_mac": True,
        }  # fmt: skip
        process = VmProcess(
            vm_testing_program(), engine="idle", kernel=kernel, devices=[device], descriptors=fds
        )
        with process:
            for fd in fds:
                os.close(fd)
            cards = [{"name": "net0", "mac": MAC, "frames": "vm process"}]
            assert process.wait_ready()["cards"] == cards
            # The first process of the two lets go of what it was given in its own time.
            deadline = time.monotonic() + 10
            while (left := nulls(process.process.pid)) > 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert left <= 1
    finally:
        links.remove("rfvhost0")

"""A VM process that misbehaves, as one that a guest took over would: what each layer stops.

The process here is ringfence-vm with an engine that only waits and a control method that does the
misdeed on the thread of one's choice. Layers are tried together and each alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.framework.programs import vm_testing_program, write_minimal_kernel
from tests.framework.vm_process import VmProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

THREADS = ["control", "vcpu", "timers", "devices"]
ACTS = [
    "open",
    "execute",
    "connect",
    "map-code",
    "mount",
    "signal",
    "trace",
    "become-root",
    "vhost",
]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return write_minimal_kernel(tmp_path / "kernel")


def jailed(kernel: Path, *, off: Sequence[str] = (), descriptors: Sequence[int] = ()) -> VmProcess:
    return VmProcess(
        vm_testing_program(),
        engine="idle",
        kernel=kernel,
        descriptors=descriptors,
        change={"jail": dict.fromkeys(off, "off")},
    )


def do(process: VmProcess, act: str, *, thread: str = "control", number: int = 0) -> object:
    """What came of a misdeed: an error number, 0 when it succeeded."""
    answer = process.call("misbehave", {"thread": thread, "act": act, "number": number})
    result = answer["result"]
    assert isinstance(result, dict)
    return result["errno"]


def layers(process: VmProcess) -> dict[str, str]:
    jail = process.wait_ready()["jail"]
    assert isinstance(jail, dict)
    return jail


def require(layer: str, held: dict[str, str]) -> None:
    """Hosts that refuse a layer (containers refuse namespaces) can't show what it stops."""
    if held[layer] != "on":
        pytest.skip(f"this host refuses the layer {layer!r}: {held[layer]}")


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("act", ACTS)
def test_a_forbidden_call_ends_the_process(kernel: Path, thread: str, act: str) -> None:
    with jailed(kernel) as process:
        assert layers(process)["system calls"] == "on"
        with pytest.raises(ConnectionError):
            do(process, act, thread=thread, number=1)
        assert process.process.wait(10) == -signal.SIGSYS


def test_ordinary_life_goes_on_behind_all_filters(kernel: Path) -> None:
    with jailed(kernel) as process:
        held = layers(process)
        assert held["system calls"] == "on"
        assert held["descriptors"] == "on"
        assert held["no new privileges"] == "on"
        for method in ["pause", "inspect", "resume", "stats", "power_button", "kill"]:
            assert "result" in process.call(method), method
        assert process.wait_exit()["reason"] == "killed"


@pytest.mark.parametrize("thread", THREADS)
def test_a_heap_that_shrinks_opens_nothing(kernel: Path, thread: str) -> None:
    with jailed(kernel) as process:
        assert layers(process)["system calls"] == "on"
        assert do(process, "shrink", thread=thread) == 0


def test_without_filters_there_are_no_paths(kernel: Path) -> None:
    with jailed(kernel, off=["seccomp", "landlock"]) as process:
        held = layers(process)
        require("empty root", held)
        for act in ["open", "execute"]:
            assert do(process, act) == errno.ENOENT


def test_without_filters_there_is_no_network(kernel: Path) -> None:
    with jailed(kernel, off=["seccomp", "landlock"]) as process:
        require("namespaces", layers(process))
        assert do(process, "connect") == errno.ENETUNREACH


def test_without_filters_other_processes_are_out_of_reach(kernel: Path) -> None:
    with jailed(kernel, off=["seccomp", "landlock"]) as process:
        require("namespaces", layers(process))
        # Its own parent has no number inside; number 1 is itself.
        assert do(process, "signal", number=process.process.pid) == errno.ESRCH


def test_without_filters_nothing_can_be_mounted(kernel: Path) -> None:
    for off in [["seccomp", "landlock"], ["seccomp", "landlock", "namespaces"]]:
        with jailed(kernel, off=off) as process:
            assert layers(process)["capabilities"] == "on"
            assert do(process, "mount") == errno.EPERM


@pytest.mark.parametrize("thread", THREADS)
def test_landlock_alone_keeps_files_away(kernel: Path, thread: str) -> None:
    with jailed(kernel, off=["seccomp", "namespaces"]) as process:
        require("landlock", layers(process))
        assert do(process, "open", thread=thread) == errno.EACCES
        assert do(process, "execute", thread=thread) == errno.EACCES


def test_no_inherited_descriptor_is_left_open(kernel: Path) -> None:
    with Path("/etc/hostname").open("rb") as file:
        # A number that the process doesn't give to something of its own.
        stray = fcntl.fcntl(file, fcntl.F_DUPFD, 900)
    try:
        with jailed(kernel, off=["seccomp"], descriptors=[stray]) as process:
            layers(process)
            assert do(process, "descriptor", number=stray) == errno.EBADF
            assert do(process, "descriptor", number=2) == 0
    finally:
        os.close(stray)


def test_a_required_layer_that_is_missing_keeps_the_machine_from_starting(kernel: Path) -> None:
    with jailed(kernel, off=["seccomp"]) as process:
        held = layers(process)
    names = ["user namespace", "namespaces", "empty root"]
    missing = [name for name in names if held[name] != "on"]
    process = VmProcess(
        vm_testing_program(),
        engine="idle",
        kernel=kernel,
        change={"jail": {"namespaces": "require", "landlock": "auto", "seccomp": "require"}},
    )
    with process:
        if missing:
            event = process.wait_exit()
            assert event["kind"] == "unsupported"
            assert missing[0] in str(event["message"])
        else:
            assert layers(process)["system calls"] == "on"


def test_the_process_cannot_be_looked_into(kernel: Path) -> None:
    with jailed(kernel) as process:
        layers(process)
        children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children")
        pids = [process.process.pid, *map(int, children.read_text().split())]
        status = Path(f"/proc/{pids[-1]}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["NoNewPrivs"] == "1"
        assert fields["CapEff"] == fields["CapPrm"] == "0" * 16
        assert fields["Seccomp"] == "2"

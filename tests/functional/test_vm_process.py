"""The VM process as its callers see it: its document, its control socket, its ends.

The engine here has no processor: its vCPUs wait. What a guest does is tested where there is one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.framework.programs import vm_testing_program, write_minimal_kernel
from tests.framework.vm_process import VmProcess

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.framework.vm_process import Json


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return write_minimal_kernel(tmp_path / "kernel")


def vm(kernel: Path, *, devices: list[Json] | None = None, **change: object) -> VmProcess:
    return VmProcess(
        vm_testing_program(), engine="idle", kernel=kernel, devices=devices or [], change=change
    )


def result(answer: Json) -> Json:
    assert isinstance(answer.get("result"), dict), answer
    value = answer["result"]
    assert isinstance(value, dict)
    return value


def error(answer: Json) -> Mapping[str, object]:
    value = answer.get("error")
    assert isinstance(value, dict), answer
    return value


def test_a_machine_runs_pauses_and_is_killed(kernel: Path) -> None:
    with vm(kernel) as process:
        ready = process.wait_ready()
        assert result(process.call("stats"))["state"] == "running"
        assert result(process.call("pause")) == {}
        inspected = result(process.call("inspect"))
        assert inspected["state"] == "paused"
        assert inspected["jail"] == ready["jail"]
        registers = inspected["registers"]
        assert isinstance(registers, list)
        assert registers[0]["rip"] == hex(16 << 20)
        assert result(process.call("resume")) == {}
        assert result(process.call("kill")) == {}
        assert process.wait_exit()["reason"] == "killed"
        assert process.process.wait(10) == 13


def test_every_device_is_on_the_bus(kernel: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    fds = [os.open(disk, os.O_RDWR), os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "vsock"))
    listener.listen()
    fds.append(listener.detach())
    devices: list[Json] = [
        {"type": "console"},
        {"type": "block", "fd": fds[0], "format": "raw", "serial": "root"},
        {"type": "fs", "tag": "root", "entries": [{"path": "/", "fd": fds[1]}]},
        {"type": "vsock", "cid": 3, "listen_fd": fds[2]},
        {"type": "rng"},
        {"type": "balloon"},
    ]
    process = VmProcess(
        vm_testing_program(), engine="idle", kernel=kernel, devices=devices, descriptors=fds
    )
    with process:
        for fd in fds:
            os.close(fd)
        process.wait_ready()
        inspected = result(process.call("inspect"))
        names = ["console0", "block1", "fs2", "vsock3", "rng4", "balloon5"]
        assert inspected["devices"] == names
        pci = inspected["pci"]
        assert isinstance(pci, list)
        ids = ["0008", "1043", "1042", "105a", "1053", "1044", "1045"]
        assert [entry["device"] for entry in pci] == ids
        counted = result(process.call("stats"))["devices"]
        assert isinstance(counted, dict)
        assert set(counted) == set(names)
        assert result(process.call("balloon", {"target_mib": 100})) == {}
        refused = error(process.call("balloon", {"target_mib": 1 << 30}))
        assert refused["kind"] == "config"
        assert result(process.call("console_size", {"columns": 100, "rows": 40})) == {}


def test_wrong_requests_are_answered_and_change_nothing(kernel: Path) -> None:
    with vm(kernel) as process:
        process.wait_ready()
        requests: list[tuple[str, Json]] = [
            ("reboot", {}),
            ("pause", {"now": True}),
            ("balloon", {"target_mib": 1}),
            ("console_size", {"columns": 1}),
            ("balloon", {}),
        ]
        for method, params in requests:
            assert error(process.call(method, params))["kind"] in {"config", "unsupported"}
        process.control.sendall(b"not json\n")
        process.control.sendall(b'{"id":"x","method":"stats"}\n')
        assert result(process.call("stats"))["state"] == "running"
        refused = [event for event in process.events if event.get("id", 0) is None]
        assert len(refused) == 2


def test_a_line_without_end_ends_the_machine(kernel: Path) -> None:
    with vm(kernel) as process:
        process.wait_ready()
        process.control.settimeout(10)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            process.control.sendall(b"x" * (1 << 24))
        assert process.process.wait(10) == 13


def test_the_machine_ends_with_its_callers_connection(kernel: Path) -> None:
    with vm(kernel) as process:
        process.wait_ready()
        process.control.close()
        assert process.process.wait(10) == 13


def test_killing_the_process_leaves_nothing(kernel: Path) -> None:
    with vm(kernel) as process:
        process.wait_ready()
        os.kill(process.process.pid, signal.SIGKILL)
        assert process.process.wait(10) == -signal.SIGKILL
        # The socket's other ends are all gone: the child of the process namespace too.
        process.control.settimeout(10)
        assert process.control.recv(1) == b""


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"version": 2}, "version"),
        ({"vcpus": 0}, "vcpus"),
        ({"memory_mib": 0}, "memory_mib"),
        ({"engine": "warp"}, "engine"),
        ({"speed": 11}, "speed"),
        ({"devices": [{"type": "floppy"}]}, "devices[0].type"),
        ({"devices": [{"type": "rng"}, {"type": "rng", "x": 1}]}, "devices[1].x"),
        ({"serial": {"out_fd": 999}}, "serial.out_fd"),
    ],
)
def test_a_wrong_document_names_the_field(kernel: Path, change: Json, path: str) -> None:
    process = VmProcess(vm_testing_program(), engine="idle", kernel=kernel, change=change)
    with process:
        assert process.process.wait(10) == 2
        assert path in process.log()


def test_a_mistake_found_later_is_told_on_the_control_socket(kernel: Path, tmp_path: Path) -> None:
    with vm(kernel, engine="warp") as process:
        event = process.wait_exit()
        assert (event["reason"], event["kind"], event["path"]) == ("error", "config", "engine")
    text = tmp_path / "text"
    text.write_text("#!/bin/sh\n")
    with vm(text) as process:
        event = process.wait_exit()
        assert (event["reason"], event["kind"]) == ("error", "format")
        assert "neither a bzImage nor an ELF image" in str(event["message"])
        assert process.process.wait(10) == 2
    fd = os.open(text, os.O_RDONLY)
    device: Json = {"type": "block", "fd": fd, "format": "qcow2"}
    process = VmProcess(
        vm_testing_program(), engine="idle", kernel=kernel, devices=[device], descriptors=[fd]
    )
    with process:
        os.close(fd)
        event = process.wait_exit()
        assert "devices[0] (block)" in str(event["message"])


def test_more_memory_than_an_address_can_name_is_refused(kernel: Path) -> None:
    with vm(kernel, memory_mib=4 << 20) as process:
        assert process.wait_exit()["kind"] == "config"


@pytest.mark.parametrize("arguments", [[], ["--config-fd"], ["--config-fd", "1"], ["--help", "x"]])
def test_a_wrong_call_says_how(arguments: list[str]) -> None:
    done = subprocess.run(
        [vm_testing_program(), *arguments], capture_output=True, check=False, text=True
    )
    assert done.returncode == 2
    assert "usage: ringfence-vm --config-fd N" in done.stderr


def test_a_document_of_another_kind_is_refused() -> None:
    read, write = os.pipe()
    os.write(write, json.dumps([1]).encode())
    os.close(write)
    done = subprocess.run(
        [vm_testing_program(), "--config-fd", str(read)],
        pass_fds=[read],
        capture_output=True,
        check=False,
        text=True,
    )
    os.close(read)
    assert done.returncode == 2
    assert "version" in done.stderr

"""Machines of the engine ``container``: what a user does with them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath

import pytest

import ringfence
from ringfence import _paths
from ringfence.container import host_tree
from ringfence.errors import GuestTimeout, HostError, UnsupportedError
from ringfence.machine import state
from tests.framework.bundles import left_behind, make_root, namespaces_held

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for control groups"),
]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "home"))


def test_a_command_sees_the_hosts_programs_and_none_of_its_secrets() -> None:
    script = (
        "id -u; cat /proc/1/cmdline | tr '\\0' ' '; cat /etc/shadow; ls /home /root; touch /usr/x"
    )

    with ringfence.Machine(engine="container") as machine:
        done = machine.run(["sh", "-c", script])
        name = machine.id

    assert done.exit_code == 0
    assert done.stdout.splitlines()[:2] == ["0", "ringfence-agent --contained /home:"]
    assert "/etc/shadow: No such file" in done.stderr
    assert not Path("/usr/x").exists()
    assert left_behind(name) == []


def test_a_directory_is_the_root_and_stays_as_it_is(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    before = sorted(path.name for path in root.rglob("*"))

    with ringfence.Machine(engine="container", root=root) as machine:
        done = machine.run(["sh", "-c", "echo x > /new; ls /; id -u"])

    assert "new" in done.stdout.splitlines()
    assert sorted(path.name for path in root.rglob("*")) == before


def test_a_mount_is_shared_and_holds_no_setuid_programs(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "in").write_text("from the host")
    mount = ringfence.Mount(source=shared, target=PurePosixPath("/data"), read_only=False)

    with ringfence.Machine(engine="container", mounts=[mount]) as machine:
        done = machine.run(
            ["sh", "-c", "cat /data/in; echo back > /data/out; grep /data /proc/mounts"]
        )

    assert done.stdout.startswith("from the host")
    assert "nosuid,nodev" in done.stdout
    assert (shared / "out").read_text() == "back\n"


def test_files_and_archives_go_both_ways() -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("a/b")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"ok"))

    with ringfence.Machine(engine="container") as machine:
        machine.files.write("/tmp/x", b"\x00\xff")
        machine.files.mkdir("/tmp/t")
        machine.files.tar_in("/tmp/t", [archive.getvalue()])
        back = machine.files.read("/tmp/t/a/b")
        data = machine.files.read("/tmp/x")

    assert (back, data) == (b"ok", b"\x00\xff")


def test_a_command_that_takes_too_long_is_killed() -> None:
    with ringfence.Machine(engine="container") as machine:
        start = time.monotonic()
        with pytest.raises(GuestTimeout):
            machine.run(["sleep", "60"], timeout_s=0.3)
        again = machine.run(["echo", "still here"])

    assert time.monotonic() - start < 5
    assert again.stdout == "still here\n"


def test_pause_holds_every_process() -> None:
    with ringfence.Machine(engine="container") as machine:
        machine.run(
            ["sh", "-c", "(while :; do echo x >> /tmp/log; sleep 0.01; done) > /dev/null 2>&1 &"]
        )
        machine.pause()
        state = machine.inspect()["state"]
        machine.resume()
        first = len(machine.files.read("/tmp/log"))
        time.sleep(0.2)
        second = len(machine.files.read("/tmp/log"))

    assert state == "paused"
    assert second > first


def test_memory_is_limited() -> None:
    with ringfence.Machine(engine="container", memory="64M") as machine:
        hog = machine.run(["python3", "-c", "b = bytearray(200 << 20); print(len(b))"])
        fine = machine.run(["echo", "alive"])

    assert hog.exit_code == 137
    assert fine.stdout == "alive\n"


def test_what_containers_lack_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="host's kernel"):
        ringfence.Machine(engine="container", kernel="6.1").start()


def test_nothing_is_left_of_a_hundred(tmp_path: Path) -> None:
    with ringfence.Machine(engine="container") as machine:
        # What a process makes once: the stores' directories, and copies of two programs.
        machine.run(["true"])
    files = sorted(tmp_path.rglob("*"))
    sockets = sorted(_paths.runtime_dir().iterdir())
    descriptors = sorted(Path("/proc/self/fd").iterdir())
    threads = sorted(Path("/proc/self/task").iterdir())
    own = namespaces_of("self")

    names: list[str] = []
    namespaces: set[str] = set()
    for _number in range(100):
        with ringfence.Machine(engine="container") as machine:
            machine.run(["true"])
            names += [machine.id, machine.name]
            namespaces |= namespaces_of(str(machine.inspect()["pid"]))

    assert len(namespaces - own) >= 6
    assert namespaces_held(namespaces - own) == set()
    assert left_behind(*names) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert sorted(tmp_path.rglob("*")) == files
    assert sorted(_paths.runtime_dir().iterdir()) == sockets
    assert sorted(Path("/proc/self/fd").iterdir()) == descriptors
    assert sorted(Path("/proc/self/task").iterdir()) == threads


def namespaces_of(process: str) -> set[str]:
    return {str(path.readlink()) for path in Path(f"/proc/{process}/ns").iterdir()}


_HOLDER = """
import sys, time, ringfence
machine = ringfence.Machine(engine="container", network="none", keep=sys.argv[1] == "kept").start()
machine.run(["sh", "-c", "sleep 1000 > /dev/null 2>&1 &"])
machine.pause()
print(machine.id, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize(("how", "listed"), [("kept", ["exited"]), ("not kept", [])])
def test_what_a_killed_holder_leaves_goes_when_somebody_looks(how: str, listed: list[str]) -> None:
    command = [sys.executable, "-c", _HOLDER, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        name = holder.stdout.readline().strip()
        holder.kill()

    before = left_behind(name)
    found = [entry.record.status for entry in state.list_machines()]

    assert len(before) > 2  # Frozen, its processes wait with its groups.
    assert found == listed
    assert left_behind(name) == []


def children() -> list[int]:
    return [
        int(name)
        for task in Path("/proc/self/task").iterdir()
        for name in (task / "children").read_text().split()
    ]


def test_a_start_that_fails_while_it_is_planned_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_words: object, **_named: object) -> dict[str, object]:
        message = "no such layer"
        raise HostError(message)

    monkeypatch.setattr(host_tree, "root_plan", refuse)
    before = children()
    machine = ringfence.Machine(engine="container", name="half-made")

    with pytest.raises(HostError, match="no such layer"):
        machine.start()

    # The setup program runs by then, and waits for its plan.
    assert children() == before
    assert state.list_machines() == []


def test_a_start_that_fails_while_it_is_set_up_leaves_nothing(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    (root / "proc").rmdir()
    (root / "proc").write_text("no directory")
    before = children()
    machine = ringfence.Machine(engine="container", root=root)

    with pytest.raises(HostError, match="proc"):
        machine.start()

    assert children() == before
    assert state.list_machines() == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()

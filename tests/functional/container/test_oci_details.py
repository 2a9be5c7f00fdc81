"""What engines and runc's own tests ask of a runtime beyond the life of a container."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import socket
import struct
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.framework.bundles import Runtime, left_behind, make_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make containers"),
]

_USERS = {
    "linux": {
        "namespaces": [{"type": "user"}],
        "uidMappings": [{"containerID": 0, "hostID": 200_000, "size": 65536}],
        "gidMappings": [{"containerID": 0, "hostID": 200_000, "size": 65536}],
    }
}


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path / "states")


@pytest.fixture
def name(runtime: Runtime) -> Iterator[str]:
    text = f"rf-test-{uuid.uuid4().hex[:12]}"
    yield text
    runtime("delete", "--force", text)
    assert left_behind(text) == []


def bind(source: Path, target: str, *options: str, **others: object) -> dict[str, object]:
    return {
        "destination": target, "type": "bind", "source": str(source),
        "options": ["bind", *options], **others,
    }  # fmt: skip


def test_a_mounts_owners_are_those_of_its_map(runtime: Runtime, name: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").touch()
    mapping = [{"containerID": 0, "hostID": 5000, "size": 10}]
    mount = bind(data, "/m", uidMappings=mapping, gidMappings=mapping)
    script = "stat -c %u:%g /m/file; touch /m/new"
    bundle = make_bundle(
        tmp_path / "b",
        "sh",
        "-c",
        script,
        mounts=[mount],
        process={"user": {"uid": 5003, "gid": 5003}},
    )
    data.chmod(0o777)

    output = runtime("run", "--bundle", str(bundle), name)

    assert output.split() == ["5000:5000"]
    assert (data / "new").stat().st_uid == 3


@pytest.fixture
def open_path() -> Iterator[Path]:
    # Other users must get to the root file system, as with engines.
    with tempfile.TemporaryDirectory(prefix="rf-oci-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_other_users_are_given_what_only_root_may_enter(
    runtime: Runtime, name: str, open_path: Path
) -> None:
    closed = open_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "data").mkdir()
    (closed / "data/word").write_text("inside\n")
    mounts = [bind(closed / "data", "/plain", "ro"), bind(closed / "data", "/mapped", "idmap")]
    script = "cat /plain/word; stat -c %u /plain/word /mapped/word; touch /plain/x"
    bundle = make_bundle(open_path / "b", "sh", "-c", script, mounts=mounts, **_USERS)

    for target in ("plain", "mapped"):
        (bundle / "rootfs" / target).mkdir()

    output = runtime("run", "--bundle", str(bundle), name, status=1)

    assert output.split()[:3] == ["inside", "65534", "0"]
    assert "Read-only file system" in output


def test_a_link_to_what_is_missing_is_made_inside(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    source = tmp_path / "resolv"
    source.write_text("nameserver 192.0.2.1\n")
    bundle = make_bundle(
        tmp_path / "b", "cat", "/etc/resolv.conf", mounts=[bind(source, "/etc/resolv.conf")]
    )
    (bundle / "rootfs/etc/resolv.conf").symlink_to("../run/resolver/stub.conf")

    output = runtime("run", "--bundle", str(bundle), name)

    assert output == "nameserver 192.0.2.1\n"
    assert (bundle / "rootfs/run/resolver/stub.conf").is_file()


def test_a_created_container_holds_nothing_of_its_callers_open(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", "true")
    secret = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    subprocess.run(
        runtime.command("create", "--bundle", str(bundle), name), pass_fds=[secret], check=True
    )
    os.close(secret)

    held = {str(path.readlink()) for path in Path(f"/proc/{runtime.pid(name)}/fd").iterdir()}

    assert str(tmp_path) not in held
    runtime("start", name)


def test_options_may_follow_the_container(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "sleep", "100")
    runtime("run", "--detach", "--bundle", str(bundle), name)

    runtime("update", name, "--pids-limit", "33")

    assert json.loads(runtime("events", "--stats", name))["data"]["pids"]["limit"] == 33


def test_exec_enters_cgroups_below_and_none_besides(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", "sleep", "100")
    runtime("run", "--detach", "--bundle", str(bundle), name)
    place = next(
        line.split(":")[2]
        for line in Path(f"/proc/{runtime.pid(name)}/cgroup").read_text().splitlines()
        if "pids" in line
    )
    below = Path(f"/sys/fs/cgroup/pids{place}/below")
    below.mkdir()

    inside = runtime("exec", "--cgroup", "pids:below", name, "cat", "/proc/self/cgroup")
    above = runtime("exec", "--cgroup", "..", name, "true", status=255)
    missing = runtime("exec", "--cgroup", "nowhere", name, "true", status=255)
    unknown = runtime("exec", "--cgroup", "what:/", name, "true", status=255)

    assert f":pids:{place}/below" in inside
    assert "bad sub cgroup path" in above
    assert "no such file or directory" in missing
    assert "unknown controller" in unknown


def test_processors_and_scheduler_are_the_containers_own(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    bundle = make_bundle(
        tmp_path / "b", "sh", "-c", "grep Cpus_allowed_list /proc/self/status; sleep 100",
        process={"scheduler": {"policy": "SCHED_BATCH", "nice": 5}},
    )  # fmt: skip
    here = runtime.command("run", "--detach", "--bundle", str(bundle), name)
    with (tmp_path / "out").open("w") as output:
        subprocess.run(["taskset", "-c", "0", *here], stdout=output, check=True)

    policy = os.sched_getscheduler(runtime.pid(name))
    shown = (tmp_path / "out").read_text().split()

    assert policy == os.SCHED_BATCH
    assert shown[-1] != "0"


def test_a_terminal_writes_lines_as_the_program_does(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", "sh", "-c", "tty; echo two", process={"terminal": True})
    ours, theirs = pty.openpty()

    done = subprocess.run(
        runtime.command("run", "--bundle", str(bundle), name),
        stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, check=True,
    )  # fmt: skip
    os.close(ours)
    os.close(theirs)

    assert done.stdout == b"/dev/pts/0\ntwo\n"


def test_a_frozen_cgroup_is_not_entered(runtime: Runtime, name: str, tmp_path: Path) -> None:
    group = Path(f"/sys/fs/cgroup/freezer/{name}")
    group.mkdir()
    (group / "freezer.state").write_text("FROZEN")
    bundle = make_bundle(tmp_path / "b", "true", linux={"cgroupsPath": f"/{name}"})

    output = runtime("run", "--bundle", str(bundle), name, status=1)

    (group / "freezer.state").write_text("THAWED")
    group.rmdir()
    assert "unexpectedly frozen" in output


@pytest.mark.parametrize("command", ["create", "exec", "ps", "update", "kill"])
def test_each_command_says_what_it_does(runtime: Runtime, command: str) -> None:
    output = runtime(command, "--help")

    assert output.startswith(f"NAME:\n   ringfence-oci {command} - ")


def test_a_process_is_sent_by_descriptor(runtime: Runtime, name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "sleep", "100")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(20)
        runtime(
            "run", "--detach", "--pidfd-socket", str(tmp_path / "s"), "--bundle", str(bundle), name
        )
        connection, _address = listener.accept()
        _data, handles, _flags, _from = socket.recv_fds(connection, 64, 1)
    shown = Path(f"/proc/self/fdinfo/{handles[0]}").read_text()
    os.close(handles[0])
    connection.close()

    assert f"Pid:\t{runtime.pid(name)}\n" in shown


def test_a_filter_that_knows_no_young_calls_lets_programs_be_found(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    refused = {"names": ["faccessat2", "statx"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused]}
    bundle = make_bundle(
        tmp_path / "b", "echo", "found",
        linux={"seccomp": seccomp}, process={"noNewPrivileges": False},
    )  # fmt: skip

    assert runtime("run", "--bundle", str(bundle), name) == "found\n"


_RECEIVE, _SEND = 0xC050_2100, 0xC018_2101
_CONTINUE = 1


def decide(listener: socket.socket, documents: list[dict[str, object]]) -> None:
    """Answers what a container's filter asks: mkdir is out of stationery, all else goes on."""
    while True:
        try:
            connection, _address = listener.accept()
        except OSError:
            return
        with connection:
            text, descriptors, _flags, _from = socket.recv_fds(connection, 1 << 16, 4)
        documents.append(json.loads(text))
        with os.fdopen(descriptors[0], "rb", buffering=0) as asked:
            while select.select([asked], [], [], 20)[0]:
                question = bytearray(80)
                try:
                    fcntl.ioctl(asked, _RECEIVE, question)
                    number, call = struct.unpack_from("<Q8xi", question)
                    refused = (-122, 0) if call in _MKDIR else (0, _CONTINUE)
                    fcntl.ioctl(asked, _SEND, struct.pack("<Qqii", number, 0, *refused))
                except OSError:
                    break  # Whoever asked has ended.


_MKDIR = (83, 258)


@pytest.mark.parametrize("promised", [True, False])
def test_another_process_decides_system_calls(
    runtime: Runtime, tmp_path: Path, *, promised: bool
) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(tmp_path / "decides"),
        "listenerMetadata": "word",
        "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat", "execve", "read", "close"], "action": "SCMP_ACT_NOTIFY"}
        ],
    }
    bundle = make_bundle(
        tmp_path, "sleep", "100",
        linux={"seccomp": profile}, process={"noNewPrivileges": promised},
    )  # fmt: skip
    documents: list[dict[str, object]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "decides"))
        listener.listen()
        # One for each process with a filter of its own.
        for _number in range(2):
            threading.Thread(target=decide, args=(listener, documents), daemon=True).start()
        runtime("run", "--detach", "--bundle", str(bundle), "asks")
        pid = runtime.pid("asks")
        output = runtime("exec", "asks", "sh", "-c", "mkdir /tmp/x; echo $?")
        runtime("delete", "--force", "asks")
        listener.shutdown(socket.SHUT_RDWR)

    assert "quota exceeded" in output.lower()
    first, second = documents
    assert (first["fds"], first["pid"], first["metadata"]) == (["seccompFd"], pid, "word")
    assert second["pid"] != pid
    assert [dict(d["state"])["id"] for d in documents] == ["asks", "asks"]  # type: ignore[call-overload]


def test_a_filter_that_asks_nobody_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    rules = [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}
    bundle = make_bundle(tmp_path, "true", linux={"seccomp": profile})

    output = runtime("run", "--bundle", str(bundle), "asks", status=1)

    assert "listenerPath is not set" in output
    assert left_behind("asks") == []


def test_a_created_container_ends_when_it_is_told_to(runtime: Runtime, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "sleep", "100")
    runtime("create", "--bundle", str(bundle), "early")
    created = runtime.status("early")

    runtime("kill", "early", "TERM")
    end = time.monotonic() + 10
    while runtime.status("early") != "stopped":
        assert time.monotonic() < end
        time.sleep(0.02)
    runtime("delete", "early")

    assert created == "created"


def test_hooks_of_the_container_begin_in_its_root(runtime: Runtime, tmp_path: Path) -> None:
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "pwd > ./tmp/where; ls > ./tmp/what"]}
    bundle = make_bundle(
        tmp_path, "cat", "/tmp/where", "/tmp/what", hooks={"createContainer": [hook]}
    )

    output = runtime("run", "--bundle", str(bundle), "hooked").split()

    assert output[0] == str(bundle / "rootfs")
    assert "bin" in output[1:]


def test_memory_on_a_directory_has_its_mode(runtime: Runtime, tmp_path: Path) -> None:
    where = str(tmp_path / "b/rootfs/private")
    mounts = [{"destination": where, "type": "tmpfs", "source": "tmpfs", "options": ["nodev"]}]
    bundle = make_bundle(
        tmp_path / "b", "sh", "-c", "grep private /proc/mounts; stat -c %a /private", mounts=mounts
    )
    (bundle / "rootfs/private").mkdir(mode=0o710)

    output = runtime("run", "--bundle", str(bundle), "memory")

    # A destination that names the root on the host is one in it.
    assert output.startswith("tmpfs /private tmpfs rw,nodev,relatime,mode=710")
    assert output.endswith("710\n")

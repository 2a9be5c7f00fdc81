"""What a guest with the host's own programs can't reach: homes, keys, sockets, the host's kernel."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.machine import host_root
from ringfence.machine.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "not for the guest: 7f3a9c"  # noqa: S105 - it guards nothing


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("xdg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        with Machine(engine="bt") as running:
            yield running


def reaches(machine: Machine, path: str) -> bool:
    """Whether the guest's root can read a file there."""
    return machine.run(["cat", path]).exit_code == 0


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow",
        "/etc/shadow-",
        "/etc/gshadow",
        "/etc/passwd-",
        "/etc/ssh/ssh_host_ed25519_key",
        "/etc/ssl/private",
        "/etc/sudoers",
        "/etc/docker/daemon.json",
        "/etc/containers/auth.json",
        "/etc/fstab",
        "/etc/subuid",
    ],
)
def test_secrets_of_etc_do_not_exist(machine: Machine, path: str) -> None:
    assert machine.run(["test", "-e", path]).exit_code == 1


@pytest.mark.parametrize("folder", ["/root", "/home", "/srv", "/opt", "/mnt", "/media", "/boot"])
def test_places_of_people_are_empty_or_not_there(machine: Machine, folder: str) -> None:
    assert machine.run(["sh", "-c", f"ls -A {folder} 2>/dev/null"]).stdout == ""


@pytest.mark.parametrize("folder", ["/tmp", "/var/tmp", "/run", "/var/lib", "/dev/shm"])
def test_the_hosts_files_are_not_the_guests(machine: Machine, folder: str) -> None:
    mine = Path(folder) / f"ringfence-secret-{os.getpid()}"
    mine.write_text(SECRET)
    try:
        assert not reaches(machine, str(mine))
    finally:
        mine.unlink()


def test_this_checkout_and_the_users_home_are_out_of_reach(machine: Machine) -> None:
    for path in (Path(__file__), Path.home() / ".ssh", Path.home() / ".bashrc", Path.cwd()):
        if not str(path).startswith("/usr/"):
            assert machine.run(["test", "-e", str(path)]).exit_code == 1


def test_sockets_below_shared_directories_are_no_way_out(machine: Machine) -> None:
    path = Path(f"/usr/local/ringfence-socket-{os.getpid()}")
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
    except OSError as error:
        pytest.skip(f"cannot make a socket below /usr here: {error}")
    try:
        listener.listen(1)
        script = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
        assert machine.run(["python3", "-c", script]).exit_code != 0
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    finally:
        listener.close()
        path.unlink()


def test_the_kernel_is_the_guests_own(machine: Machine) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    assert machine.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout != boot_id
    script = "echo from-the-guest > /proc/sys/kernel/hostname; hostname"
    assert machine.run(["sh", "-c", script]).stdout == "from-the-guest\n"
    assert socket.gethostname() != "from-the-guest"
    pids = machine.run(["sh", "-c", "ls -d /proc/[0-9]* | wc -l"]).stdout
    assert int(pids) < 200
    assert machine.run(["test", "-e", "/dev/kvm"]).exit_code == 1


def test_writing_changes_nothing_on_the_host(machine: Machine) -> None:
    name = f"ringfence-written-{os.getpid()}"
    for folder in ("/usr/bin", "/etc", "/usr/local"):
        assert machine.run(["touch", f"{folder}/{name}"]).exit_code == 0
        assert not (Path(folder) / name).exists()
    assert machine.run(["rm", "/usr/bin/env"]).exit_code == 0
    assert Path("/usr/bin/env").exists()


def test_the_way_below_the_overlay_is_read_only(machine: Machine) -> None:
    script = (
        "mkdir -p /mnt/x && mount -t virtiofs root /mnt/x && ls /mnt/x &&"
        " (touch /mnt/x/usr/new; mknod /mnt/x/usr/d b 8 0; ln /mnt/x/etc/passwd /mnt/x/usr/l);"
        " cat /mnt/x/etc/shadow /mnt/x/usr/../../etc/shadow /mnt/x/../etc/shadow; ls -A /mnt/x/home"
    )
    result = machine.run(["sh", "-c", script])
    assert "root:" not in result.stdout
    for name in ("new", "d", "l"):
        assert not Path("/usr", name).exists()


def test_accounts_of_people_are_not_known(machine: Machine) -> None:
    seen = machine.run(["cat", "/etc/passwd"]).stdout
    assert seen == "".join(host_root.passwd_lines())
    uids = {int(line.split(":")[2]) for line in seen.splitlines()}
    assert not {uid for uid in uids if 1000 <= uid < 65534}
    assert ":x:" in seen
    assert "$" not in seen


def test_no_environment_of_the_host_comes_along(machine: Machine) -> None:
    os.environ["RINGFENCE_TEST_SECRET"] = SECRET
    try:
        assert SECRET not in machine.run(["env"]).stdout
        assert SECRET.encode() not in machine.run(["cat", "/proc/1/environ"]).stdout_bytes
    finally:
        del os.environ["RINGFENCE_TEST_SECRET"]


def test_the_host_cannot_be_seen_over_vsock(machine: Machine) -> None:
    script = (
        "import socket\n"
        "for port in (22, 1023, 1025, 2049):\n"
        "    s = socket.socket(socket.AF_VSOCK); s.settimeout(2)\n"
        "    try:\n"
        "        s.connect((2, port)); s.send(b'x'); print(port, s.recv(1))\n"
        "    except OSError as error:\n"
        "        print('refused')\n"
    )
    found = machine.run(["python3", "-c", script]).stdout.split("\n")
    assert set(found) <= {"refused", ""} or all(
        "b''" in line for line in found if line[:1].isdigit()
    )

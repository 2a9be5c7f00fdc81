"""Whole machines on networks, by each engine."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence import Machine, Policy, Sandbox
from ringfence.errors import ConfigError

if TYPE_CHECKING:
    from ringfence.machine.spec import EngineName
    from tests.framework.networks import Peer

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture(params=["bt", "container"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    return name


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels stay where they are.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


_WEB = "curl --silent --show-error --max-time 10"


def test_a_machine_reaches_outside_and_asks_for_names(engine: EngineName, peer: Peer) -> None:
    options = {"network": "user", "dns": [peer.v4], "hosts": {"db.test": "192.0.2.7"}}
    with Machine(engine=engine, **options) as machine:  # type: ignore[arg-type]
        for url in (f"http://{peer.v4}/", f"http://[{peer.v6}]/", "http://www.example/"):
            assert machine.run([*_WEB.split(), url]).stdout.endswith(
                url.removeprefix("http://").rstrip("/")
            )
        assert "192.0.2.7" in machine.run(["getent", "hosts", "db.test"]).stdout
        assert machine.run([*_WEB.split(), f"http://{peer.v4}:4/"]).exit_code == 7


def test_rules_hold_whole_machines(engine: EngineName, peer: Peer) -> None:
    policy = Policy(allow=["good.example"])
    with Sandbox(engine=engine, network=policy, dns=[peer.v4]) as box:
        assert box.run([*_WEB.split(), "http://good.example/"]).exit_code == 0
        assert box.run([*_WEB.split(), "http://evil.example/"]).exit_code == 6
        assert box.run([*_WEB.split(), f"http://{peer.v4}/"]).exit_code != 0


def test_a_shared_address_is_open_for_the_allowed_name_alone(
    engine: EngineName, peer: Peer
) -> None:
    only = ["good.example"]
    for network in ("nat", "user"):
        with Machine(engine=engine, network=network, allow=only, dns=[peer.v4]) as machine:
            assert machine.run([*_WEB.split(), "http://good.example/"]).exit_code == 0
            shared = ["--connect-to", f"evil.example:80:{peer.v4}:80", "http://evil.example/"]
            # It was reset.
            assert machine.run([*_WEB.split(), *shared]).exit_code == 56, network


_PULL = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 19), timeout=20) as s:
    s.sendall(b"8000000\\n")
    start, got = time.monotonic(), 0
    while data := s.recv(1 << 16):
        got += len(data)
    assert got == 8_000_000
    print(got / (time.monotonic() - start))
"""
_PUSH = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 9), timeout=20) as s:
    start = time.monotonic()
    s.sendall(b"x" * 8_000_000)
    s.shutdown(socket.SHUT_WR)
    assert s.recv(100) == b"8000000"
    print(8_000_000 / (time.monotonic() - start))
"""


@pytest.mark.parametrize("network", ["nat", "user"])
def test_bandwidth_is_bounded_each_way(engine: EngineName, network: str, peer: Peer) -> None:
    with Machine(engine=engine, network=network, bandwidth="2M") as machine:
        for source in (_PUSH, _PULL):
            done = machine.run(["python3", "-c", source, peer.v4], timeout_s=60)
            assert done.exit_code == 0, done.stderr
            # A second's worth may come at once.
            assert 0.3 * (2 << 20) < float(done.stdout) < 1.5 * (2 << 20)


_BY_EACH_VCPU = """
import os, socket, sys
for cpu in os.sched_getaffinity(0):
    os.sched_setaffinity(0, {cpu})
    with socket.create_connection((sys.argv[1], 9), timeout=20) as s:
        s.sendall(b"x" * 1_000_000)
        s.shutdown(socket.SHUT_WR)
        assert s.recv(100) == b"1000000"
"""


def test_a_card_has_queues_for_each_vcpu_and_uses_them(peer: Peer) -> None:
    with Machine(engine="bt", vcpus=2, network="nat") as machine:
        queues = machine.run(["ls", "/sys/class/net/eth0/queues"]).stdout.split()
        assert queues == ["rx-0", "rx-1", "tx-0", "tx-1"]
        done = machine.run(["python3", "-c", _BY_EACH_VCPU, peer.v4], timeout_s=60)
        assert done.exit_code == 0, done.stderr
        interrupts = machine.run(["cat", "/proc/interrupts"]).stdout.splitlines()
        came = {
            line.split()[-1]: sum(int(word) for word in line.split()[1:3])
            for line in interrupts
            if "-input." in line or "-output." in line
        }
        assert len(came) == 4, came
        assert sum(1 for name, count in came.items() if "input" in name and count) == 2, came


def test_a_published_port_reaches_a_machine(engine: EngineName) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Machine(engine=engine, network="user", ports=[f"{port}:8000"]) as machine:
        source = (
            "import socket; t = socket.create_server(('', 8000)); s, _ = t.accept();"
            "s.sendall(b'guest ' + s.recv(100))"
        )
        with machine.popen(["python3", "-c", source]):
            deadline = time.monotonic() + 20
            answer = b""
            while not answer and time.monotonic() < deadline:
                # Nobody may listen yet.
                with (
                    suppress(ConnectionResetError),
                    socket.create_connection(("127.0.0.1", port), timeout=5) as one,
                ):
                    one.sendall(b"hello")
                    answer = one.recv(100)
                time.sleep(0.1)
            assert answer == b"guest hello"


def test_machines_of_all_engines_share_a_network(peer: Peer) -> None:
    for network in ("isolated", "nat"):
        with (
            Machine(engine="bt", name="one", network=network) as one,
            Machine(engine="container", name="two", network=network) as two,
        ):
            source = (
                "import socket; t = socket.create_server(('', 8000));"
                "s, _ = t.accept(); s.sendall(s.recv(100))"
            )
            ask = (
                "import socket, sys, time\n"
                "for _ in range(50):\n"
                "    try: s = socket.create_connection((sys.argv[1], 8000), 5); break\n"
                "    except ConnectionRefusedError: time.sleep(0.1)\n"
                "s.sendall(b'hello'); print(s.recv(100).decode())"
            )
            for server, client, name in ((one, two, "one"), (two, one, "two")):
                with server.popen(["python3", "-c", source]):
                    done = client.run(["python3", "-c", ask, name], timeout_s=30)
                    assert done.stdout == "hello\n", done.stderr
            reached = one.run([*_WEB.split(), f"http://{peer.v4}/"]).exit_code == 0
            assert reached == (network == "nat")


def test_a_machine_without_a_network_has_nothing_to_publish() -> None:
    with pytest.raises(ConfigError, match="can't publish ports"):
        Machine(engine="bt", network="none", ports=["1:1"]).start()


def _gateways() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if path.read_text().startswith("ringfence-gatew"):
                found.add(path.parent.name)
    return found


def test_no_thread_and_no_gateway_is_left(engine: EngineName, tmp_path: Path) -> None:
    threads, gateways = threading.active_count(), _gateways()
    with Machine(engine=engine, network="user") as machine:
        machine.run(["true"])
        assert len(_gateways() - gateways) >= 1
    assert threading.active_count() == threads
    assert not list((tmp_path / "run").rglob("*.sock"))

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

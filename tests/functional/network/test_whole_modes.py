"""Whole machines on networks of the host's kernel, by each engine: who they reach, and who reaches them."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from ringfence import Machine
from ringfence.network import links, manage
from ringfence.network.kernel import table_of
from ringfence.network.store import NetworkSpec, Store
from tests.framework.networks import Namespace
from tests.functional.network.test_kernel_modes import host_port
from tests.functional.network.test_machines import _state, engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.machine.spec import EngineName
    from tests.framework.networks import Peer

__all__ = ["_state", "engine", "host_port"]

pytestmark = [pytest.mark.root, pytest.mark.netns]


def _web(machine: Machine, address: str, port: int = 80) -> str:
    """What a web server there says: who asked it, first."""
    host = f"[{address}]" if ":" in address else address
    return machine.run(
        ["curl", "--silent", "--max-time", "5", f"http://{host}:{port}/"]
    ).stdout.removeprefix("::ffff:")


def _pings(machine: Machine, address: str) -> bool:
    return machine.run(["ping", "-c", "1", "-W", "2", address]).exit_code == 0


def _own(machine: Machine) -> list[str]:
    shown = machine.run(["ip", "-o", "addr", "show", "dev", "eth0", "scope", "global"]).stdout
    return [line.split()[3].partition("/")[0] for line in shown.splitlines()]


def test_nat_leads_outside_not_to_the_host(engine: EngineName, peer: Peer, host_port: int) -> None:
    with Machine(engine=engine, network="nat") as machine:
        assert _web(machine, peer.v4).startswith("198.51.100.1 ")
        assert _web(machine, peer.v6).startswith("2001:db8:9::1 ")
        for address in (peer.v4, peer.v6):
            assert _pings(machine, address)
        assert machine.run(["getent", "hosts", "host.ringfence.internal"]).exit_code == 0
        done = machine.run(["bash", "-c", f"exec 3<>/dev/tcp/198.51.100.1/{host_port}"])
        assert done.exit_code != 0


def test_routed_machines_are_seen_as_they_are(engine: EngineName, peer: Peer) -> None:
    with Machine(engine=engine, network="routed:10.97.0.0/24") as machine:
        v4, v6 = sorted(_own(machine), key=lambda text: ":" in text)
        peer.run("ip", "route", "replace", "10.97.0.0/24", "via", "198.51.100.1")
        peer.run("ip", "-6", "route", "replace", f"{v6}/128", "via", "2001:db8:9::1")
        assert _web(machine, peer.v4).startswith(f"{v4} ")
        assert _web(machine, peer.v6).startswith(f"{v6} ")
        for address in (v4, v6):
            assert peer.run("ping", "-c", "1", "-W", "2", address).returncode == 0


def test_host_only_leads_to_the_host_alone(engine: EngineName, peer: Peer, host_port: int) -> None:
    with Machine(engine=engine, network="host-only") as machine:
        name = "host.ringfence.internal"
        done = machine.run(
            ["bash", "-c", f"exec 3<>/dev/tcp/{name}/{host_port}; echo hi >&3; head -c 4 <&3"]
        )
        assert done.stdout == "host"
        for address in (peer.v4, peer.v6):
            assert not _pings(machine, address)
            assert _web(machine, address) == ""


@pytest.fixture
def neighbour() -> Iterator[tuple[str, Namespace]]:
    """A bridge of the host, and a host on its LAN."""
    bridge = f"rfw{os.getpid() % 100000}"
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", "10.98.0.1/24", "dev", bridge], check=True)
    subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
    try:
        with Namespace() as host:
            links.add_veth("rftnb0", "eth0", bridge, 1500, host.pid)
            host.run("ip", "addr", "add", "10.98.0.9/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            yield bridge, host
    finally:
        subprocess.run(["ip", "link", "del", bridge], check=True)


def test_bridge_makes_a_machine_a_peer_on_the_lan(
    engine: EngineName, neighbour: tuple[str, Namespace]
) -> None:
    bridge, host = neighbour
    with Machine(engine=engine, network=f"bridge:{bridge},ip=10.98.0.7/24") as machine:
        for address in ("10.98.0.1", "10.98.0.9"):
            assert _pings(machine, address)
        assert host.run("ping", "-c", "1", "-W", "2", "10.98.0.7").returncode == 0


@pytest.mark.parametrize("mode", ["nat", "user"])
def test_packets_are_as_large_as_the_network_says(engine: EngineName, mode: str) -> None:
    manage.create(NetworkSpec(name="large", mode=mode, mtu=9000, subnets=("10.96.0.0/24",)))
    with Machine(engine=engine, network="large") as machine:
        assert machine.run(["cat", "/sys/class/net/eth0/mtu"]).stdout == "9000\n"
        ping = ["ping", "-c", "1", "-W", "2", "-M", "do", "-s"]
        assert machine.run([*ping, "8972", "10.96.0.1"]).exit_code == 0
        assert machine.run([*ping, "8973", "10.96.0.1"]).exit_code != 0


def test_two_users_have_networks_of_one_name(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "one"))
    with Machine(engine="container", name="box", network="nat") as one:
        table = table_of(Store().find("nat"))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "two"))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run2"))
        with Machine(engine="container", name="box", network="nat") as two:
            assert _web(one, peer.v4).startswith("198.51.100.1 ")
            assert _web(two, peer.v4).startswith("198.51.100.1 ")
            assert not set(_own(one)) & set(_own(two))
            for address in _own(two):
                assert not _pings(one, address)
        # One's end takes nothing of the other's.
        tables = subprocess.run(
            ["nft", "list", "tables"], capture_output=True, text=True, check=True
        ).stdout
        assert table in tables
        assert _web(one, peer.v4).startswith("198.51.100.1 ")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "one"))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))

"""Mode ``bridge`` on an interface of the host that is no bridge: the host stays reachable all the while."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError
from ringfence.network import AttachOptions, Policy, PublishedPort, attach, manage
from ringfence.network.kernel import refusals
from ringfence.network.store import NetworkSpec, Store
from tests.framework.lan import HOST4, HOST6, PEER4, PEER6, Lan, ip
from tests.functional.network.test_shared import pings
from tests.functional.network.test_user import ask

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.functional.network.conftest import MakeGuest

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture
def plain_lan(tmp_path: Path) -> Iterator[Lan]:
    with ExitStack() as stack:
        lan = Lan(tmp_path, stack)
        stack.callback(subprocess.run, ["ip", "link", "del", lan.interface], check=False)
        yield lan


def test_a_plain_interface_becomes_a_port_and_the_host_stays_reachable(
    make_guest: MakeGuest, plain_lan: Lan
) -> None:
    before = plain_lan.state()
    with socket.create_connection((PEER4, 7), timeout=5) as open_since:
        one = make_guest(f"bridge:{plain_lan.interface}", name="one", dns=())
        two = make_guest(f"bridge:{plain_lan.interface}", name="two", dns=())
        open_since.sendall(b"before")
        assert open_since.recv(100) == b"before"
        own = one.attachment.interface
        assert own.addresses[0].startswith("10.93.0.1")
        assert (own.gateways, own.dns) == ((PEER4,), (PEER4,))
        neighbour = two.attachment.interface.addresses[0].partition("/")[0]
        for address in (HOST4, PEER4, neighbour):
            assert pings(one, address), address
        assert ask(one, PEER4, 7) == "hello"
        assert plain_lan.peer.run("ping", "-c", "1", "-W", "1", HOST4).returncode == 0
        assert plain_lan.peer.run("ping", "-6", "-c", "1", "-W", "1", HOST6).returncode == 0
        assert plain_lan.peer.run("ping", "-c", "1", "-W", "1", neighbour).returncode == 0
        assert "10.193.0.0/24 via 10.93.0.9" in ip("route")
        one.close()
        two.close()
        open_since.sendall(b"after")
        assert open_since.recv(100) == b"after"
    assert plain_lan.state() == before
    assert Store().names() == []


@pytest.mark.usefixtures("home")
def test_a_killed_holder_leaves_the_hosts_addresses_to_the_next_command(plain_lan: Lan) -> None:
    before = plain_lan.state()
    child = os.fork()
    if child == 0:
        attach(f"bridge:{plain_lan.interface}", "doomed", "vm", AttachOptions(dns=("192.0.2.1",)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert plain_lan.state() != before
    manage.heal()
    assert plain_lan.state() == before
    assert Store().names() == []


@pytest.mark.usefixtures("home")
def test_a_kill_at_any_moment_leaves_the_hosts_addresses(plain_lan: Lan) -> None:
    before = plain_lan.state()
    for delay_s in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
        child = os.fork()
        if child == 0:
            timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL))
            timer.start()
            options = AttachOptions(addresses=("10.93.0.50/24",))
            attach(f"bridge:{plain_lan.interface}", "doomed", "vm", options)
            signal.pause()
        os.waitpid(child, 0)
        manage.heal()
        assert plain_lan.state() == before, delay_s
    assert Store().names() == []


def test_users_share_an_interface_and_the_last_one_gives_it_back(
    make_guest: MakeGuest, plain_lan: Lan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plain_lan.state()
    network = f"bridge:{plain_lan.interface}"
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "one"))
    one = make_guest(network, name="box", dns=(), addresses=("10.93.0.50",))
    moved = plain_lan.state()
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "two"))
    two = make_guest(network, name="box", dns=(), addresses=("10.93.0.51",))
    assert pings(one, "10.93.0.51")
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "one"))
    one.close()
    assert plain_lan.state() == moved
    assert ask(two, PEER4, 7) == "hello"
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "two"))
    two.close()
    assert plain_lan.state() == before


def test_a_server_of_the_host_itself_tells_addresses_too(
    make_guest: MakeGuest, tmp_path: Path
) -> None:
    """As the networks of other virtual machines have one."""
    bridge = f"rfu{os.getpid() % 100000}"
    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("addr", "add", "10.95.1.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        words = [
            "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", f"--interface={bridge}",
            "--bind-interfaces", f"--dhcp-leasefile={tmp_path / 'host-leases'}", "--user=root",
            "--dhcp-range=10.95.1.100,10.95.1.100,255.255.255.0,1h",
        ]  # fmt: skip
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as serving:
            assert serving.stderr is not None
            assert "started" in serving.stderr.readline()
            # It has one address, and each machine gives that back.
            for _ in range(3):
                one = make_guest(f"bridge:{bridge}", name="one", dns=())
                own = one.attachment.interface
                assert own.addresses == ("10.95.1.100/24",)
                assert own.gateways == ("10.95.1.1",)
                assert pings(one, "10.95.1.1")
                one.close()
            serving.terminate()
        assert "rfd" not in ip("-br", "link")
    finally:
        ip("link", "del", bridge)


def test_a_machine_says_its_own_address(make_guest: MakeGuest, plain_lan: Lan) -> None:
    network = f"bridge:{plain_lan.interface}"
    one = make_guest(network, name="one", dns=(), addresses=("10.93.0.77", "fd00:93::77"))
    assert one.attachment.interface.addresses == ("10.93.0.77/24", "fd00:93::77/64")
    for address in (HOST4, PEER4, HOST6, PEER6):
        assert pings(one, address), address
    with pytest.raises(ConfigError, match="prefix"):
        make_guest(network, name="two", dns=(), addresses=("203.0.113.5",))


def test_packets_are_as_large_as_the_lans(make_guest: MakeGuest, plain_lan: Lan) -> None:
    ip("link", "set", plain_lan.interface, "mtu", "9000")
    assert plain_lan.peer.run("ip", "link", "set", "eth0", "mtu", "9000").returncode == 0
    one = make_guest(f"bridge:{plain_lan.interface}", name="one", dns=(), addresses=("10.93.0.77",))
    for guest, address in ((one, PEER4), (one, HOST4), (plain_lan.peer, HOST4)):
        large = ("ping", "-c", "1", "-W", "1", "-M", "do", "-s", "8972", address)
        assert guest.run(*large).returncode == 0, address


def test_rules_about_addresses_hold_on_a_lan(make_guest: MakeGuest, plain_lan: Lan) -> None:
    network = f"bridge:{plain_lan.interface}"
    rules = Policy(allow=[f"{PEER4}:7"])
    options = {"dns": (), "addresses": ("10.93.0.77/24", "fd00:93::77/64")}
    one = make_guest(network, name="one", policy=rules, **options)
    assert ask(one, PEER4, 7) == "hello"
    assert ask(one, PEER6, 7) == "TimeoutError"
    assert not pings(one, HOST4)
    # Others reach it: its answers are not what it begins.
    assert plain_lan.peer.run("ping", "-c", "1", "-W", "1", "10.93.0.77").returncode == 0
    found = refusals(Store().find(f"bridge-{plain_lan.interface}"))
    recent = found["recent"]
    assert isinstance(recent, list)
    assert {entry["reason"] for entry in recent} == {"not-allowed"}


@pytest.mark.usefixtures("home")
def test_what_a_lan_cannot_have_is_refused(plain_lan: Lan) -> None:
    before = plain_lan.state()
    network = f"bridge:{plain_lan.interface}"
    with pytest.raises(ConfigError, match="own address"):
        attach(network, "m", "vm", AttachOptions(publish=(PublishedPort(host=0, guest=80),)))
    spec = NetworkSpec(
        name="x", mode="bridge", interface=plain_lan.interface, subnets=("10.94.0.0/24",)
    )
    with pytest.raises(ConfigError, match="LAN's addresses"):
        manage.create(spec)
    assert plain_lan.state() == before
    assert Store().names() == []

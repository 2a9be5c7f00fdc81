"""Networks of the host's kernel: who reaches whom, and who doesn't."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, ConflictError, NotFoundError, UnsupportedError
from ringfence.network import Policy, PublishedPort, attach, links, manage, tables
from ringfence.network.kernel import bridge_of, describe, table_of
from ringfence.network.store import NetworkSpec, Store
from tests.functional.network.test_shared import addresses, pings
from tests.functional.network.test_user import ask, ask_udp, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.framework.networks import Peer
    from tests.functional.network.conftest import Guest, MakeGuest

pytestmark = [pytest.mark.root, pytest.mark.netns]


def _tables() -> str:
    done = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return done.stdout


def _links() -> str:
    done = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def host_port() -> Iterator[int]:
    """A service of the host on all its addresses."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:

        def serve() -> None:
            while True:
                try:
                    one, _ = server.accept()
                except OSError:
                    return
                with one:
                    one.sendall(b"host " + one.recv(100))

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serving() -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for one in running:
        one.kill()
        one.communicate()


_SERVE = """
import socket
t = socket.create_server(("::", 8000), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    s, peer = t.accept()
    s.sendall(b"guest " + s.recv(100) + b" " + peer[0].encode())
    s.close()
"""


def serve(guest: Guest, running: list[subprocess.Popen[str]]) -> None:
    one = guest.spawn("python3", "-c", _SERVE)
    running.append(one)
    assert one.stdout is not None
    assert one.stdout.readline() == "ready\n"


def test_nat_leads_outside_and_to_each_other_not_to_the_host(
    make_guest: MakeGuest, peer: Peer, host_port: int, serving: list[subprocess.Popen[str]]
) -> None:
    one = make_guest("nat", name="one", dns=())
    two = make_guest("nat", name="two", dns=())
    serve(two, serving)
    for address in (peer.v4, peer.v6):
        assert pings(one, address)
        assert ask(one, address, 7) == "hello"
        assert ask_udp(one, address, 7) == "hello"
    # Seen outside by the host's address.
    web = "GET / HTTP/1.0\r\nHost: x\r\n\r\n"
    assert "198.51.100.1 x" in ask(one, peer.v4, 80, web)
    for address in addresses(two):
        assert pings(one, address)
        assert ask(one, address, 8000).startswith("guest hello")
        assert ask(peer, address, 8000) != "guest hello"
    assert resolve(one, "two") == addresses(two)
    first = one.attachment.interface.gateways[0]
    for address in (first, "198.51.100.1"):
        assert ask(one, address, host_port) == "ConnectionRefusedError"


def test_host_only_leads_to_the_host_and_each_other(
    make_guest: MakeGuest, peer: Peer, host_port: int
) -> None:
    one = make_guest("host-only", name="one", dns=())
    two = make_guest("host-only", name="two", dns=())
    assert pings(one, addresses(two)[0])
    assert pings(one, addresses(two)[1])
    host = one.attachment.interface.dns[0]
    assert ask(one, host, host_port) == "host hello"
    for address in (peer.v4, peer.v6):
        assert not pings(one, address)
        assert ask(one, address, 7) in ("OSError", "TimeoutError", "ConnectionRefusedError")


def test_routed_machines_are_reached_from_outside_by_their_own_addresses(
    make_guest: MakeGuest, peer: Peer, serving: list[subprocess.Popen[str]]
) -> None:
    one = make_guest("routed:10.79.0.0/24", name="one", dns=())
    v4, v6 = addresses(one)
    assert v4 == "10.79.0.2"
    peer.run("ip", "route", "replace", "10.79.0.0/24", "via", "198.51.100.1")
    peer.run("ip", "-6", "route", "replace", f"{v6}/128", "via", "2001:db8:9::1")
    serve(one, serving)
    assert ask(one, peer.v4, 7) == "hello"
    web = "GET / HTTP/1.0\r\nHost: x\r\n\r\n"
    assert f"{v4} x" in ask(one, peer.v4, 80, web)
    for address in (v4, v6):
        assert ask(peer, address, 8000).startswith("guest hello")


@pytest.fixture
def lan(peer: Peer) -> Iterator[str]:  # noqa: ARG001 - root's tests have it
    name = f"rfl{os.getpid() % 100000}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", "10.80.0.1/24", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    yield name
    subprocess.run(["ip", "link", "del", name], check=True)


def test_bridge_puts_machines_on_the_lan(make_guest: MakeGuest, lan: str) -> None:
    one = make_guest(f"bridge:{lan}", name="one", dns=())
    two = make_guest(f"bridge:{lan}", name="two", dns=())
    for number, guest in ((2, one), (3, two)):
        guest.run("ip", "addr", "add", f"10.80.0.{number}/24", "dev", "eth0")
    assert pings(one, "10.80.0.1")
    assert pings(one, "10.80.0.3")
    # Held to its own Ethernet address.
    one.run("ip", "link", "set", "eth0", "address", "02:00:00:00:00:66")
    assert not pings(one, "10.80.0.1")


def test_neighbours_cannot_be_impersonated(make_guest: MakeGuest) -> None:
    victim = make_guest("nat", name="victim", dns=())
    liar = make_guest("nat", name="liar", dns=())
    stolen = addresses(victim)
    for address, bits in zip(stolen, ("24", "64"), strict=True):
        liar.run("ip", "addr", "add", f"{address}/{bits}", "dev", "eth0", "nodad")
    for address, target in zip(stolen, liar.attachment.interface.gateways, strict=True):
        done = liar.run("ping", "-c", "1", "-W", "1", "-I", address, target)
        assert done.returncode != 0
        assert pings(victim, target)


def test_rules_of_network_and_machine_hold_together(make_guest: MakeGuest, peer: Peer) -> None:
    spec = manage.create(NetworkSpec(name="ruled", mode="nat", allow=(f"{peer.v4}:7,80", peer.v6)))
    one = make_guest("ruled", dns=())
    two = make_guest("ruled", dns=(), policy=Policy(deny=[f"{peer.v4}:80"]))
    web = "GET / HTTP/1.0\r\n\r\n"
    assert ask(one, peer.v4, 7) == ask(two, peer.v4, 7) == "hello"
    assert "200 OK" in ask(one, peer.v4, 80, web)
    assert ask(two, peer.v4, 80, web) == "ConnectionRefusedError"
    assert ask(one, peer.v4, 9) == "ConnectionRefusedError"
    assert ask(one, peer.v6, 7) == "hello"
    assert ask(one, "169.254.169.254", 80) == "ConnectionRefusedError"
    refused = describe(spec)["refused"]
    assert isinstance(refused, dict)
    assert refused["closed"] >= 1
    assert refused["denied"] >= 1
    assert refused["not_allowed"] >= 1


def test_published_ports_are_on_the_hosts_loopback(
    make_guest: MakeGuest, peer: Peer, serving: list[subprocess.Popen[str]]
) -> None:
    ports = (
        PublishedPort(host=0, guest=8000),
        PublishedPort(host=0, guest=8000, address="0.0.0.0"),  # noqa: S104 - said on purpose
    )
    one = make_guest("nat", publish=ports, dns=())
    serve(one, serving)
    near, far = (port.host for port in one.attachment.published)
    with socket.create_connection(("127.0.0.1", near), timeout=5) as link:
        link.sendall(b"hello")
        assert link.recv(100).startswith(b"guest hello")
    assert ask(peer, "198.51.100.1", far).startswith("guest hello")
    assert not ask(peer, "198.51.100.1", near).startswith("guest")
    with pytest.raises(ConflictError, match="in use"):
        make_guest("nat", publish=(PublishedPort(host=near, guest=1),), dns=())


@pytest.mark.usefixtures("home", "peer")
def test_everything_goes_with_the_last_machine_or_with_a_killed_holder() -> None:
    links, tables = _links(), _tables()
    with attach("nat", "good", "vm") as attachment:
        device, fds = attachment.device_config()
        assert device["tap_fds"] == fds
        spec = Store().find("nat")
        assert bridge_of(spec) in _links()
        assert table_of(spec) in _tables()
    assert (_links(), _tables()) == (links, tables)
    child = os.fork()
    if child == 0:
        attach("nat", "doomed", "vm")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert _tables() != tables
    manage.heal()
    assert (_links(), _tables()) == (links, tables)
    assert Store().names() == []


@pytest.mark.usefixtures("home", "peer")
def test_what_cannot_be_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    links, tables = _links(), _tables()
    with pytest.raises(NotFoundError, match="no interface"):
        attach("bridge:nowhere0", "m", "vm")
    with pytest.raises(UnsupportedError, match="no Ethernet link"):
        attach("bridge:lo", "m", "vm")
    with pytest.raises(ConfigError, match="behind a colon"):
        attach("nat:10.0.0.0/8", "m", "vm")
    with pytest.raises(ConflictError, match="route"):
        attach("routed:198.51.100.0/24", "m", "vm")
    monkeypatch.setattr("ringfence.network.links.has_rights", lambda: False)
    with pytest.raises(UnsupportedError, match="needs root"):
        attach("nat", "m", "vm")
    assert (_links(), _tables(), Store().names()) == (links, tables, [])


def test_a_bridge_keeps_its_address_when_machines_come_and_go(make_guest: MakeGuest) -> None:
    one = make_guest("nat", name="one", dns=())
    first = one.attachment.interface.gateways[0]

    def known() -> str:
        assert pings(one, first)
        return one.run("ip", "neigh", "show", first).stdout.split()[4]

    before = known()
    # Each link's own is chosen by chance: one of these would be taken.
    for number in range(8):
        make_guest("nat", name=f"more{number}", dns=())
        assert pings(one, first)
    one.run("ip", "neigh", "flush", "all")
    assert known() == before


@pytest.mark.usefixtures("peer")
def test_the_hosts_own_bridge_keeps_its_address_too(make_guest: MakeGuest) -> None:
    bridge, port = f"rfq{os.getpid() % 100000}", f"rfr{os.getpid() % 100000}"
    # No address was given to it: it has its port's, the highest that there is but for a few.
    words = ["ip", "link", "add", port, "address", "fa:ff:ff:ff:ff:01", "type", "veth"]
    subprocess.run(words, check=True)
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    try:
        subprocess.run(["ip", "link", "set", port, "up", "master", bridge], check=True)
        subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
        address = Path(f"/sys/class/net/{bridge}/address")
        before = address.read_text()
        assert before == "fa:ff:ff:ff:ff:01\n"
        guests = [
            make_guest(f"bridge:{bridge}", dns=(), addresses=(f"10.98.1.{n}/24",)) for n in (2, 3)
        ]
        assert address.read_text() == before
        for guest in guests:
            guest.close()
        assert address.read_text() == before
    finally:
        for name in (bridge, port):
            subprocess.run(["ip", "link", "del", name], check=True)


@pytest.fixture
def strict_firewall() -> Iterator[str]:
    """A firewall of the host that drops what it doesn't know."""
    name = f"strict{os.getpid()}"
    chains = "".join(
        f"add chain ip {name} {hook} {{ type filter hook {hook} priority 0; policy drop; }}\n"
        f"add rule ip {name} {hook} iifname lo accept\n"
        for hook in ("input", "forward")
    )
    tables.run("-f", "-", script=f"add table ip {name}\n{chains}")
    yield name
    tables.run("delete", "table", "ip", name)


def test_a_firewall_of_the_host_that_drops_is_said_with_what_admits_it(
    make_guest: MakeGuest, peer: Peer, strict_firewall: str, caplog: pytest.LogCaptureFixture
) -> None:
    guest = make_guest("nat", dns=())
    assert ask(guest, peer.v4, 7) == "TimeoutError"
    told = caplog.text
    commands = [text.split(" nft ")[1].split("\n")[0] for text in told.split("accept")[:-1]]
    bridge = bridge_of(Store().find("nat"))
    assert len(commands) == 3
    for command in commands:
        assert bridge in command
        assert strict_firewall in command
        tables.run(*command.split(), "accept")
    assert ask(guest, peer.v4, 7) == "hello"
    guest.close()
    caplog.clear()
    make_guest("nat", dns=())
    assert caplog.text == ""


def test_a_link_that_goes_while_it_is_removed_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_index", lambda *_: 1 << 30)
    links.remove("rftgone")


_SERVE_UDP = """
import socket
u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
u.bind(("::", 8000))
print("ready", flush=True)
while True:
    data, peer = u.recvfrom(100)
    u.sendto(b"udp " + data, peer)
"""


def test_datagrams_and_ipv6_are_published_too(
    make_guest: MakeGuest, peer: Peer, serving: list[subprocess.Popen[str]]
) -> None:
    ports = tuple(
        PublishedPort(host=0, guest=8000, address=address, transport=transport)
        for address in ("127.0.0.1", "198.51.100.1", "::", "2001:db8:9::1")
        for transport in ("tcp", "udp")
    )
    one = make_guest("nat", publish=ports, dns=())
    serve(one, serving)
    serving.append(one.spawn("python3", "-c", _SERVE_UDP))
    assert serving[-1].stdout is not None
    assert serving[-1].stdout.readline() == "ready\n"
    for port in one.attachment.published:
        address = {"::": "2001:db8:9::1"}.get(port.address, port.address)
        if address == "127.0.0.1":
            kind = socket.SOCK_STREAM if port.transport == "tcp" else socket.SOCK_DGRAM
            with socket.socket(socket.AF_INET, kind) as link:
                link.settimeout(5)
                link.connect((address, port.host))
                link.send(b"hello")
                found = link.recv(100).decode()
        else:
            asking = ask if port.transport == "tcp" else ask_udp
            found = asking(peer, address, port.host)
        assert found.startswith({"tcp": "guest hello", "udp": "udp hello"}[port.transport]), port

"""Mode ``bridge`` on an interface of the host that is no bridge: the host stays reachable all the while."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, UnsupportedError
from ringfence.network import AttachOptions, Policy, PublishedPort, attach, manage
from ringfence.network.kernel import refusals
from ringfence.network.store import NetworkSpec, Store
from tests.framework.networks import Namespace
from tests.functional.network.test_shared import pings
from tests.functional.network.test_user import ask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.functional.network.conftest import MakeGuest

pytestmark = [pytest.mark.root, pytest.mark.netns]

_HOST4, _HOST6 = "10.93.0.1", "fd00:93::1"
_PEER4, _PEER6 = "10.93.0.9", "fd00:93::9"
_ECHO = """
import socket, threading
t = socket.create_server(("::", 7), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
def serve(s):
    while data := s.recv(100):
        s.sendall(data)
while True:
    threading.Thread(target=serve, args=(t.accept()[0],), daemon=True).start()
"""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    return done.stdout


class Lan:
    """A plain interface of this host, and a peer on its LAN that is a router and a DHCP server."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.interface = f"rfp{os.getpid() % 100000}"
        self.peer = stack.enter_context(Namespace())
        _ip(
            "link",
            "add",
            self.interface,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            str(self.peer.pid),
        )
        for address in (f"{_HOST4}/24", f"{_HOST6}/64"):
            nodad = ("nodad",) if ":" in address else ()
            _ip("addr", "add", address, "dev", self.interface, *nodad)
        _ip("link", "set", self.interface, "up")
        for words in (
            ("addr", "add", f"{_PEER4}/24", "dev", "eth0"),
            ("addr", "add", f"{_PEER6}/64", "dev", "eth0", "nodad"),
            ("link", "set", "eth0", "up"),
        ):
            assert self.peer.run("ip", *words).returncode == 0
        # A way that this host has by the LAN.
        _ip("route", "add", "10.193.0.0/24", "via", _PEER4, "dev", self.interface)
        self._serve("python3", "-c", _ECHO, stack=stack)
        self._dhcp(folder, stack)

    def _serve(self, *argv: str, stack: ExitStack) -> None:
        running = self.peer.spawn(*argv)
        stack.callback(running.communicate)
        stack.callback(running.kill)
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"

    def _dhcp(self, folder: Path, stack: ExitStack) -> None:
        words = [
            "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0",
            "--bind-interfaces", f"--dhcp-leasefile={folder / 'lan-leases'}", "--user=root",
            "--dhcp-range=10.93.0.100,10.93.0.120,255.255.255.0,1h",
            f"--dhcp-option=option:router,{_PEER4}", f"--dhcp-option=option:dns-server,{_PEER4}",
        ]  # fmt: skip
        running = self.peer.spawn(*words)
        stack.callback(running.communicate)
        stack.callback(running.kill)

    def state(self) -> tuple[str, str, str]:
        """What this host has on the LAN, but for how long it has been there."""
        addresses = _ip("-br", "addr", "show", "dev", self.interface).split()[2:]
        routes = [_ip("-4", "route", "show", "dev", self.interface)]
        routes.append(_ip("-6", "route", "show", "dev", self.interface))
        master = Path(f"/sys/class/net/{self.interface}/master").exists()
        plain = [text for text in addresses if not text.startswith("fe80")]
        return " ".join(sorted(plain)), "\n".join(sorted("".join(routes).splitlines())), str(master)


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
    with socket.create_connection((_PEER4, 7), timeout=5) as open_since:
        one = make_guest(f"bridge:{plain_lan.interface}", name="one", dns=())
        two = make_guest(f"bridge:{plain_lan.interface}", name="two", dns=())
        open_since.sendall(b"before")
        assert open_since.recv(100) == b"before"
        own = one.attachment.interface
        assert own.addresses[0].startswith("10.93.0.1")
        assert (own.gateways, own.dns) == ((_PEER4,), (_PEER4,))
        neighbour = two.attachment.interface.addresses[0].partition("/")[0]
        for address in (_HOST4, _PEER4, neighbour):
            assert pings(one, address), address
        assert ask(one, _PEER4, 7) == "hello"
        assert plain_lan.peer.run("ping", "-c", "1", "-W", "1", _HOST4).returncode == 0
        assert plain_lan.peer.run("ping", "-6", "-c", "1", "-W", "1", _HOST6).returncode == 0
        assert plain_lan.peer.run("ping", "-c", "1", "-W", "1", neighbour).returncode == 0
        assert "10.193.0.0/24 via 10.93.0.9" in _ip("route")
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


def test_a_machine_says_its_own_address(make_guest: MakeGuest, plain_lan: Lan) -> None:
    network = f"bridge:{plain_lan.interface}"
    one = make_guest(network, name="one", dns=(), addresses=("10.93.0.77", "fd00:93::77"))
    assert one.attachment.interface.addresses == ("10.93.0.77/24", "fd00:93::77/64")
    for address in (_HOST4, _PEER4, _HOST6, _PEER6):
        assert pings(one, address), address
    with pytest.raises(ConfigError, match="prefix"):
        make_guest(network, name="two", dns=(), addresses=("203.0.113.5",))


def test_rules_about_addresses_hold_on_a_lan(make_guest: MakeGuest, plain_lan: Lan) -> None:
    network = f"bridge:{plain_lan.interface}"
    rules = Policy(allow=[f"{_PEER4}:7"])
    options = {"dns": (), "addresses": ("10.93.0.77/24", "fd00:93::77/64")}
    one = make_guest(network, name="one", policy=rules, **options)
    assert ask(one, _PEER4, 7) == "hello"
    assert ask(one, _PEER6, 7) == "TimeoutError"
    assert not pings(one, _HOST4)
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
    with pytest.raises(UnsupportedError, match="about a name"):
        attach(network, "m", "vm", AttachOptions(policy=Policy(deny=["example.com"])))
    spec = NetworkSpec(
        name="x", mode="bridge", interface=plain_lan.interface, subnets=("10.94.0.0/24",)
    )
    with pytest.raises(ConfigError, match="LAN's addresses"):
        manage.create(spec)
    assert plain_lan.state() == before
    assert Store().names() == []

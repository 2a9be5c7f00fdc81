"""Rules about names on a LAN: the host tells the names, and looks at connections that are open by one alone."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import pytest

from ringfence import Machine
from ringfence.errors import UnsupportedError
from ringfence.network import AttachOptions, Policy, addresses, attach, manage
from ringfence.network.kernel import refusals
from ringfence.network.store import NetworkSpec, Store
from tests.framework.lan import FAR4, FAR6, HOST4, HOST6, PEER4, PEER6, Lan, ip
from tests.functional.network.test_killed import killed_anywhere
from tests.functional.network.test_machines import _state, engine
from tests.functional.network.test_names_seen import (
    _MARKS,
    _RESET,
    _web,
    assert_names_decide,
)
from tests.functional.network.test_shared import pings
from tests.functional.network.test_user import ask, ask_udp, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.machine.spec import EngineName
    from tests.framework.networks import Peer
    from tests.functional.network.conftest import Guest, MakeGuest

__all__ = ["_state", "engine"]

pytestmark = [pytest.mark.root, pytest.mark.netns]

_REFUSED = ["code 5", "code 5"]
_OWN = ("10.93.0.77/24", "fd00:93::77/64")


@pytest.fixture
def lan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lan]:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {PEER4}\n")
    monkeypatch.setattr(addresses, "_RESOLV", resolv)
    with ExitStack() as stack:
        found = Lan(tmp_path, stack)
        stack.callback(subprocess.run, ["ip", "link", "del", found.interface], check=False)
        yield found


def guest_on(make_guest: MakeGuest, lan: Lan, **options: object) -> Guest:
    options = {"dns": (), "addresses": _OWN, "name": "one", **options}
    guest = make_guest(f"bridge:{lan.interface}", **options)
    # Its routers are not the host's: this host has no default route.
    guest.run("ip", "route", "replace", "default", "via", PEER4)
    guest.run("ip", "-6", "route", "replace", "default", "via", "fd00:93::9")
    return guest


def test_an_address_that_names_share_is_open_for_the_allowed_one_alone(
    make_guest: MakeGuest, lan: Lan
) -> None:
    before = lan.state()
    one = guest_on(make_guest, lan, policy=Policy(allow=["good.example"]))
    assert one.attachment.interface.dns == (HOST4, HOST6)
    # Nobody asked for a name yet: the address is not open.
    assert ask(one, FAR4, 80) == "TimeoutError"
    assert resolve(one, "evil.example") == _REFUSED
    assert resolve(one, "good.example") == [FAR4, FAR6]
    for address, seen in ((FAR4, HOST4), (FAR6, HOST6)):
        assert_names_decide(one, address, seen)
        # What isn't TCP is open by the address that was answered.
        assert pings(one, address)
        # QUIC hides it.
        assert ask_udp(one, address, 443) == "TimeoutError"
    found = refusals(Store().find(f"bridge-{lan.interface}"))
    counts = found["counts"]
    assert isinstance(counts, dict)
    assert counts["name"] == 6
    assert {"one"} == {entry["port"] for entry in found["recent"]}  # type: ignore[attr-defined]
    assert "evil.example" in str(found["recent"])
    one.close()
    assert lan.state() == before
    assert Store().names() == []
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    assert "ringfence" not in tables.stdout


def test_no_name_leads_past_the_lan(make_guest: MakeGuest, peer: Peer, lan: Lan) -> None:
    """The host has other ways outside: they are not the machine's."""
    one = guest_on(make_guest, lan, policy=Policy(allow=["good.example"]))
    assert resolve(one, "good.example") == [FAR4, FAR6]
    looking = lan.peer.spawn("python3", "-c", _MARKS)
    assert looking.stdout is not None
    assert looking.stdout.readline() == "ready\n"
    assert _web(one, FAR4, "good.example") == "answered"
    # No packet carries a mark.
    assert looking.communicate()[0] == "{0}\n"
    assert peer.run("ip", "addr", "add", f"{FAR4}/32", "dev", "lo").returncode == 0
    try:
        ip("route", "replace", FAR4, "via", peer.v4)
        assert _web(one, FAR4, "good.example") == _RESET
    finally:
        ip("route", "del", FAR4)
        peer.run("ip", "addr", "del", f"{FAR4}/32", "dev", "lo")


def test_whomever_a_machine_asks_the_host_answers(make_guest: MakeGuest, lan: Lan) -> None:
    """A guest may choose another name server, and peers may be one: none but the host is heard."""
    one = guest_on(make_guest, lan, policy=Policy(allow=["good.example"]))
    for server in (PEER4, FAR4, "192.0.2.53"):
        assert _asks(one, server, "evil.example") == ["code 5", "code 5"], server
        assert _asks(one, server, "good.example") == [FAR4, FAR6], server
        assert _asks(one, server, "tcp/good.example") == [FAR4, FAR6], server
    router = lan.peer.run("ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link").stdout
    for server in (f"{router.split()[3].partition('/')[0]}%eth0", PEER6):
        for by in ("udp", "tcp"):
            assert one.python(_ASKS6, server, "evil.example", by) == "5 0", server
            assert one.python(_ASKS6, server, "good.example", by) == "0 1", server
    for port in (853, 5353):
        assert ask_udp(one, PEER4, port) == "TimeoutError"
    assert ask(one, PEER4, 853) == "TimeoutError"
    # The host tells names to its machines alone, and their doors are closed to others.
    assert ask(lan.peer, HOST4, 53) == "ConnectionRefusedError"
    for port in _doors():
        assert ask(lan.peer, HOST4, port) == "TimeoutError"


_ASKS6 = """
import socket, struct, sys
server, name, by = sys.argv[1:4]
q = b"\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0"
q += b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\\0\\0\\x1c\\0\\1"
kind = socket.SOCK_STREAM if by == "tcp" else socket.SOCK_DGRAM
with socket.socket(socket.AF_INET6, kind) as s:
    s.settimeout(5)
    s.connect(socket.getaddrinfo(server, 53, socket.AF_INET6, kind)[0][4])
    s.send((len(q).to_bytes(2, "big") if by == "tcp" else b"") + q)
    a = s.recv(4096)[2 if by == "tcp" else 0:]
    print(a[3] & 15, a[7])
"""


def _asks(guest: Guest, server: str, name: str) -> list[str]:
    told = guest.attachment._interface
    guest.attachment._interface = replace(told, dns=(server,))
    try:
        return resolve(guest, name)
    finally:
        guest.attachment._interface = told


def _doors() -> set[int]:
    lines = subprocess.run(["ss", "-Hlntu"], capture_output=True, text=True, check=True).stdout
    local = [line.split()[4] for line in lines.splitlines()]
    found = {int(text.rpartition(":")[2]) for text in local if text.startswith(HOST4)}
    assert len(found) == 2
    return found


def test_machines_have_rules_each_by_its_link(make_guest: MakeGuest, lan: Lan) -> None:
    """Who has which address says nothing: here one takes the other's."""
    one = guest_on(make_guest, lan, policy=Policy(allow=["good.example"]))
    two = guest_on(
        make_guest, lan, name="two", addresses=("10.93.0.78/24",), policy=Policy(allow=["*.test"])
    )
    three = guest_on(make_guest, lan, name="three", addresses=("10.93.0.79/24",))
    assert resolve(one, "good.example") == [FAR4, FAR6]
    assert _web(one, FAR4, "good.example") == "answered"
    one.run("ip", "link", "set", "eth0", "down")
    # As a VM, whose system may have asked the LAN for others than it was given.
    network = f"bridge-{lan.interface}"
    (member,) = (found for found, _ in Store().members(network) if found.name == "two")
    Store().rewrite(network, replace(member, held=False))
    manage.set_policy(network, Policy())
    two.run("ip", "addr", "del", "10.93.0.78/24", "dev", "eth0")
    two.run("ip", "addr", "add", _OWN[0], "dev", "eth0")
    two.run("ip", "route", "replace", "default", "via", PEER4)
    assert resolve(two, "good.example") == _REFUSED
    assert _web(two, FAR4, "good.example") == "TimeoutError"
    assert not pings(two, PEER4)
    assert _web(three, FAR4, "evil.example") == "answered"
    assert _asks(three, PEER4, "evil.example") == [FAR4, FAR6]


def test_a_denied_name_is_refused_wherever_it_shows(make_guest: MakeGuest, lan: Lan) -> None:
    one = guest_on(make_guest, lan, policy=Policy(deny=["*.evil.example"]))
    assert resolve(one, "a.evil.example") == _REFUSED
    for address in (FAR4, FAR6):
        assert _web(one, address, "a.evil.example") == _RESET
        assert _web(one, address, "good.example") == "answered"
        assert ask(one, address, 7) == "hello"
    # The LAN is reached as ever, and by whom it is.
    assert pings(one, PEER4)
    assert pings(one, HOST4)


def test_rules_about_names_begin_and_end_while_machines_run(
    make_guest: MakeGuest, lan: Lan
) -> None:
    one = guest_on(make_guest, lan, dns=(PEER4,))
    network = f"bridge-{lan.interface}"
    assert _web(one, FAR4, "evil.example") == "answered"
    with one_that_stays(one, FAR4) as first:
        manage.set_policy(network, Policy(allow=["good.example"]))
        assert first.says() == "echo"
        # Its name server is the LAN's; what it asks there the host answers.
        assert resolve(one, "good.example") == [FAR4, FAR6]
        assert _web(one, FAR4, "good.example") == "answered"
        assert _web(one, FAR4, "evil.example") == _RESET
        with one_that_stays(one, FAR4) as second:
            # What was answered for one name is not open for the next.
            manage.set_policy(network, Policy(allow=["other.test"]))
            assert ask(one, FAR4, 7) == "TimeoutError"
            assert ask_udp(one, FAR4, 7) == "TimeoutError"
            assert second.says() == "echo"
            manage.set_policy(network, Policy())
            assert _web(one, FAR4, "evil.example") == "answered"
            assert resolve(one, "evil.example") == [FAR4, FAR6]
            assert second.says() == "echo"
        assert first.says() == "echo"


_STAYS = """
import socket, sys
with socket.create_connection((sys.argv[1], 7), timeout=5) as s:
    print("ready", flush=True)
    for line in sys.stdin:
        s.sendall(line.encode())
        print(s.recv(100).decode().strip() or "ended", flush=True)
"""


class one_that_stays:  # noqa: N801 - reads as words
    """A connection of a guest that is there for a while."""

    def __init__(self, guest: Guest, address: str) -> None:
        words = [*guest._inside(), "python3", "-c", _STAYS, address]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def says(self) -> str:
        """What it hears of what it says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("echo\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_killed_anywhere_it_leaves_nothing(home: Path, lan: Lan) -> None:
    before = lan.state()
    killed_anywhere(home, f"bridge:{lan.interface}")
    assert lan.state() == before


@pytest.mark.usefixtures("home")
def test_a_host_without_an_address_there_tells_no_names(lan: Lan) -> None:
    ip("addr", "flush", "dev", lan.interface)
    before = lan.state()
    rules = Policy(allow=["example.com"])
    with pytest.raises(UnsupportedError, match="no address on") as caught:
        attach(
            f"bridge:{lan.interface}",
            "m",
            "vm",
            AttachOptions(policy=rules, addresses=("10.93.0.9/24",)),
        )
    assert "ip addr add" in caught.value.hint
    spec = NetworkSpec(name="x", mode="bridge", interface=lan.interface, allow=("example.com",))
    with pytest.raises(UnsupportedError, match="no address on"):
        manage.create(spec)
    assert lan.state() == before
    assert Store().names() == []


def test_whole_machines_are_held(engine: EngineName, lan: Lan) -> None:
    network = f"bridge:{lan.interface}"
    curl = ["curl", "--silent", "--show-error", "--max-time", "10"]
    with Machine(engine=engine, network=network, allow=["good.example"]) as machine:
        asked = machine.run([*curl, "http://good.example/"])
        assert asked.stdout.endswith(f"{HOST4} good.example"), asked.stderr
        assert machine.run([*curl, "http://evil.example/"]).exit_code == 6
        shared = ["--connect-to", f"evil.example:80:{FAR4}:80", "http://evil.example/"]
        # It was reset.
        assert machine.run([*curl, *shared]).exit_code == 56


SERVES = """
import socket
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.bind(("", 7000))
t = socket.create_server(("", 7000))
print("ready", flush=True)
data, who = u.recvfrom(100)
u.sendto(data, who)
s, _ = t.accept()
s.sendall(s.recv(100))
"""


def test_a_bridge_of_the_hosts_own_may_have_no_other_port(make_guest: MakeGuest, lan: Lan) -> None:
    """Its Ethernet address is then its first machine's, from when that is there."""
    bridge = f"rfs{lan.interface[3:]}"
    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("addr", "add", "10.95.0.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        rules = Policy(deny=["evil.example"])
        network, own = f"bridge:{bridge}", ("10.95.0.5",)
        one = make_guest(network, name="one", dns=(), addresses=own, policy=rules)
        assert resolve(one, "good.example") == [FAR4, FAR6]
        assert resolve(one, "evil.example") == _REFUSED
        with subprocess.Popen(["python3", "-c", SERVES], stdout=subprocess.PIPE) as serving:
            assert serving.stdout is not None
            assert serving.stdout.readline() == b"ready\n"
            # The host itself is reached past the relay.
            assert ask_udp(one, "10.95.0.1", 7000) == "hello"
            assert ask(one, "10.95.0.1", 7000) == "hello"
        one.close()
    finally:
        ip("link", "del", bridge)

"""Networks that machines share through a gateway: ``user`` and ``isolated``. No root is needed for them."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, ConflictError, NotFoundError, UnsupportedError
from ringfence.network import Policy, attach, gateway, manage
from ringfence.network.store import NetworkSpec, Store
from ringfence.network.user import control_path
from tests.functional.network.test_user import ask, resolve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.framework.networks import Peer
    from tests.functional.network.conftest import Guest, MakeGuest

pytestmark = [pytest.mark.root, pytest.mark.netns]


def addresses(guest: Guest) -> list[str]:
    return [text.partition("/")[0] for text in guest.attachment.interface.addresses]


def pings(guest: Guest, address: str) -> bool:
    return guest.run("ping", "-c", "1", "-W", "1", address).returncode == 0


def test_isolated_machines_reach_each_other_and_nothing_else(
    make_guest: MakeGuest, peer: Peer
) -> None:
    one = make_guest("isolated", name="one", dns=())
    two = make_guest("isolated", name="two", dns=())
    for address in addresses(two):
        assert pings(one, address)
    listener = two.spawn("python3", "-c", _SERVE)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "ready\n"
    try:
        for address in addresses(two):
            assert ask(one, address, 8000) == "got 5"
    finally:
        listener.kill()
        listener.communicate()
    assert resolve(one, "two") == addresses(two)
    for address in (peer.v4, peer.v6, "198.51.100.1"):
        assert ask(one, address, 7) in ("OSError", "ConnectionRefusedError")
    # Not the host either, by the gateway's own address.
    first = one.attachment.interface.dns[0]
    assert ask(one, first, 22) == "ConnectionRefusedError"


_SERVE = """
import socket
t = socket.create_server(("::", 8000), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    s, _ = t.accept()
    s.sendall(b"got %d" % len(s.recv(100000)))
    s.close()
"""


def test_a_shared_gateway_leads_outside_and_to_each_other(
    make_guest: MakeGuest, peer: Peer
) -> None:
    manage.create(NetworkSpec(name="web", mode="user", subnets=("10.77.0.0/24",)))
    one = make_guest("web", name="one", dns=())
    two = make_guest("web", name="two", dns=())
    assert addresses(one)[0] == "10.77.0.2"
    for guest in (one, two):
        assert ask(guest, peer.v4, 7) == "hello"
        assert ask(guest, peer.v6, 7) == "hello"
    assert pings(one, addresses(two)[0])
    with pytest.raises(ConflictError, match="machines are on"):
        manage.remove("web")
    one.close()
    assert ask(two, peer.v4, 7) == "hello"
    two.close()
    manage.remove("web")
    assert Store().names() == []
    assert not control_path("web").exists()


def test_neighbours_cannot_be_impersonated(make_guest: MakeGuest) -> None:
    victim = make_guest("isolated", name="victim", dns=())
    liar = make_guest("isolated", name="liar", dns=())
    other = make_guest("isolated", name="other", dns=())
    stolen = addresses(victim)
    liar.run("ip", "addr", "add", f"{stolen[0]}/24", "dev", "eth0")
    liar.run("ip", "addr", "add", f"{stolen[1]}/64", "dev", "eth0", "nodad")
    # Gratuitous ARP and a flood of made-up Ethernet addresses.
    liar.python(_LIES, stolen[0])
    for address, target in zip(stolen, addresses(other), strict=True):
        assert pings(other, address)
        done = liar.run("ping", "-c", "1", "-W", "1", "-I", address, target)
        assert done.returncode != 0
    seen = other.run("ip", "neigh", "show", stolen[0]).stdout
    assert victim.attachment.interface.mac in seen
    with gateway.connect(control_path("isolated")) as control:
        ports = control.status()["ports"]
    spoofed = {port["name"]: port["counters"]["spoofed_frames"] for port in ports}  # type: ignore[attr-defined]
    assert spoofed[liar.id] > 1000
    assert spoofed[victim.id] == spoofed[other.id] == 0


_LIES = """
import os, socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
own = s.getsockname()[4]
ip = socket.inet_aton(sys.argv[1])
for op in (1, 2):
    arp = b"\\0\\1\\x08\\0\\6\\4\\0" + bytes([op]) + own + ip + b"\\xff" * 6 + ip
    for _ in range(20):
        s.send(b"\\xff" * 6 + own + b"\\x08\\x06" + arp + b"\\0" * 18)
for n in range(2000):
    s.send(b"\\xff" * 6 + b"\\2" + os.urandom(5) + b"\\x08\\0" + os.urandom(50))
"""


def test_what_a_killed_holder_left_is_taken_away(home: Path, peer: Peer) -> None:  # noqa: ARG001
    child = os.fork()
    if child == 0:
        attach("isolated", "doomed", "container")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    store = Store()
    assert [member.machine_id for member, lives in store.members("isolated") if not lives]
    manage.heal()
    assert store.names() == []
    assert not control_path("isolated").exists()


def test_wrong_wishes_are_refused_and_leave_nothing(home: Path) -> None:  # noqa: ARG001
    manage.create(NetworkSpec(name="a", mode="user", subnets=("10.78.0.0/24",)))
    for spec, error, words in (
        (NetworkSpec(name="a", mode="user"), ConflictError, "already"),
        (
            NetworkSpec(name="b", mode="user", subnets=("10.78.0.128/25",)),
            ConflictError,
            "overlaps",
        ),
        (NetworkSpec(name="b", mode="bridge"), ConfigError, "interface"),
        (NetworkSpec(name="nat", mode="user"), ConfigError, "called"),
        (NetworkSpec(name="../x", mode="user"), ConfigError, "called"),
        (NetworkSpec(name="b", mode="user", mtu=100), ConfigError, "bytes"),
        (NetworkSpec(name="b", mode="user", allow=("?",)), ConfigError, "rule"),
    ):
        with pytest.raises(error, match=words):
            manage.create(spec)
    with pytest.raises(NotFoundError, match="no network"):
        attach("nowhere", "m", "vm")
    assert Store().names() == ["a"]


def test_isolated_has_nothing_that_rules_could_be_about(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnsupportedError, match="nothing leaves"):
        manage.create(NetworkSpec(name="alone", mode="isolated", allow=("10.0.0.0/8",)))
    manage.create(NetworkSpec(name="alone", mode="isolated"))
    with pytest.raises(UnsupportedError, match="nothing leaves"):
        manage.set_policy("alone", Policy(default="deny"))
    assert not Store().find("alone").policy.says_something
    # A machine's rules may be for another of its networks.
    make_guest("alone", policy=Policy(default="deny"))
    assert "nothing leaves alone" in caplog.text


def test_one_machine_has_rules_of_its_own_beside_the_networks(
    make_guest: MakeGuest, peer: Peer
) -> None:
    manage.create(NetworkSpec(name="both", mode="user", deny=(f"{peer.v4}:9",)))
    one = make_guest("both", policy=Policy(allow=[f"{peer.v4}:7,9"]))
    two = make_guest("both")
    assert ask(one, peer.v4, 7) == ask(two, peer.v4, 7) == "hello"
    assert ask(one, peer.v4, 9) == ask(two, peer.v4, 9) == "ConnectionRefusedError"
    assert ask(one, peer.v6, 7) == "ConnectionRefusedError"
    assert ask(two, peer.v6, 7) == "hello"
    assert manage.set_machine_policy(one.id, Policy()) == ["both"]
    assert ask(one, peer.v6, 7) == "hello"
    manage.set_policy("both", Policy(default="deny"))
    assert ask(two, peer.v6, 7) == "ConnectionRefusedError"
    assert Store().find("both").default == "deny"

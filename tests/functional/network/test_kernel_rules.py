"""Rules, refusals, bounds and captures of networks that the host's kernel serves."""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ringfence.network import Policy, Rate, addresses, manage
from ringfence.network.capture import capture
from ringfence.network.kernel import bridge_of, describe, refusals
from ringfence.network.store import NetworkSpec, Store
from tests.functional.network.test_kernel_modes import serve, serving
from tests.functional.network.test_shared import addresses as addresses_of
from tests.functional.network.test_shared import pings
from tests.functional.network.test_user import ask, ask_udp, resolve

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.framework.networks import Peer
    from tests.functional.network.conftest import Guest, MakeGuest

__all__ = ["serving"]

pytestmark = [pytest.mark.root, pytest.mark.netns]

# For each kind of address.
_REFUSED = ["code 5", "code 5"]


@pytest.fixture(autouse=True)
def _names(tmp_path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's name server is the peer."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {peer.v4}\n")
    monkeypatch.setattr(addresses, "_RESOLV", resolv)


def _connect(guest: Guest, name: str, port: int) -> str:
    """What becomes of a connection by name."""
    return ask(guest, resolve(guest, name)[0], port)


def test_rules_about_names_hold_by_what_the_name_server_answered(
    make_guest: MakeGuest, peer: Peer
) -> None:
    manage.create(NetworkSpec(name="named", mode="nat", allow=("good.example:7", "*.wild.example")))
    one = make_guest("named", dns=())
    # Nobody asked for a name yet: the address is not open.
    assert ask(one, peer.v4, 7) == "ConnectionRefusedError"
    for name in ("evil.example", "sub.good.example", "wild.example"):
        assert resolve(one, name) == _REFUSED, name
    assert resolve(one, "good.example") == [peer.v4, peer.v6]
    for address in (peer.v4, peer.v6):
        assert ask(one, address, 7) == "hello"
        assert ask_udp(one, address, 7) == "hello"
        assert ask(one, address, 9) == "ConnectionRefusedError"
    assert _connect(one, "a.b.wild.example", 19) != "ConnectionRefusedError"
    recent = refusals(Store().find("named"))["recent"]
    assert isinstance(recent, list)
    said = {(entry["transport"], entry["destination"], entry["reason"]) for entry in recent}
    assert ("tcp", f"{peer.v4}:7", "not-allowed") in said
    time.sleep(1.2)
    recent = refusals(Store().find("named"))["recent"]
    assert isinstance(recent, list)
    names = {entry["destination"] for entry in recent if entry["transport"] == "dns"}
    assert names == {"evil.example", "sub.good.example", "wild.example"}


def test_denied_names_are_not_resolved_and_others_are(make_guest: MakeGuest, peer: Peer) -> None:
    one = make_guest("nat", name="one", dns=(), policy=Policy(deny=["*.evil.example"]))
    two = make_guest("nat", name="two", dns=())
    assert resolve(one, "a.evil.example") == _REFUSED
    assert resolve(one, "fine.example") == [peer.v4, peer.v6]
    assert resolve(two, "a.evil.example") == [peer.v4, peer.v6]
    assert resolve(one, "two") == addresses_of(two)


def test_rules_are_changed_while_machines_run(make_guest: MakeGuest, peer: Peer) -> None:
    manage.create(NetworkSpec(name="changed", mode="nat"))
    one = make_guest("changed", dns=())
    assert ask(one, peer.v4, 7) == "hello"
    manage.set_policy("changed", Policy(deny=[peer.v4]))
    assert ask(one, peer.v4, 7) == "ConnectionRefusedError"
    counted = refusals(Store().find("changed"))["counts"]
    manage.set_policy("changed", Policy(allow=["good.example"]))
    assert _connect(one, "good.example", 7) == "hello"
    manage.set_policy("changed", Policy())
    assert ask(one, peer.v4, 7) == "hello"
    assert manage.set_machine_policy(one.id, Policy(default="deny")) == ["changed"]
    assert ask(one, peer.v4, 7) == "ConnectionRefusedError"
    # What was counted before is not forgotten.
    after = refusals(Store().find("changed"))["counts"]
    assert isinstance(counted, dict)
    assert isinstance(after, dict)
    assert after["denied"] == counted["denied"] >= 1


def test_the_hosts_loopback_is_closed_until_it_is_opened(make_guest: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            while True:
                try:
                    one, _ = server.accept()
                except OSError:
                    return
                with one:
                    one.sendall(one.recv(100))

        threading.Thread(target=answer, daemon=True).start()
        for network in ("nat", "host-only"):
            guest = make_guest(network, dns=())
            first = guest.attachment.interface.dns[0]
            # A guest that routes the host's loopback to the host.
            guest.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
            guest.run("ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
            guest.run("ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
            guest.run("ip", "route", "add", "127.0.0.0/8", "via", first)
            assert ask(guest, "127.0.0.1", port) in ("TimeoutError", "OSError")
            assert ask(guest, first, port) == "ConnectionRefusedError"
        opened = make_guest("nat", name="opened", dns=(), policy=Policy(allow=[f"host:{port}"]))
        address = resolve(opened, "host.ringfence.internal")[0]
        assert ask(opened, address, port) == "hello"
        server.shutdown(socket.SHUT_RDWR)


def test_host_only_has_rules(make_guest: MakeGuest) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:  # noqa: S104 - for the guest
        port = server.getsockname()[1]
        one = make_guest("host-only", dns=(), policy=Policy(default="deny"))
        assert ask(one, one.attachment.interface.dns[0], port) == "ConnectionRefusedError"


def test_host_only_has_rules_about_the_names_that_it_tells(
    make_guest: MakeGuest, peer: Peer
) -> None:
    """The host's own and the machines' names; others aren't told there, and lead nowhere."""
    with (
        socket.create_server(("0.0.0.0", 0)) as open_one,  # noqa: S104 - for the guest
        socket.create_server(("0.0.0.0", 0)) as closed_one,  # noqa: S104
    ):
        port, other = (one.getsockname()[1] for one in (open_one, closed_one))
        host = "host.ringfence.internal"
        one = make_guest(
            "host-only", dns=(), policy=Policy(allow=[f"{host}:{port}", "good.example"])
        )
        two = make_guest("host-only", name="two", dns=(), policy=Policy(deny=[f"{host}:{other}"]))
        own = one.attachment.interface.dns[0]
        assert ask(one, own, port) == "ConnectionRefusedError"
        assert resolve(one, host)[0] == own
        assert _opens(one, own, port)
        assert not _opens(one, own, other)
        assert resolve(two, host)[0] == own
        assert _opens(two, own, port)
        assert not _opens(two, own, other)
        assert resolve(one, "two") == addresses_of(two)
        assert pings(one, addresses_of(two)[0])
        assert resolve(one, "good.example") == ["code 2", "code 2"]
        assert resolve(one, "evil.example") == _REFUSED
        assert ask(one, peer.v4, 7) != "hello"


def _opens(guest: Guest, address: str, port: int) -> bool:
    source = """
import socket, sys
try: socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)
except ConnectionRefusedError: print("refused")
"""
    return guest.python(source, address, str(port)) == ""


def test_a_machine_keeps_the_address_that_it_asks_for(make_guest: MakeGuest) -> None:
    spec = NetworkSpec(
        name="leased", mode="nat", subnets=("10.91.0.0/24",), leases=("db=10.91.0.2",)
    )
    manage.create(spec)
    first = make_guest("leased", name="web", dns=())
    asked = make_guest("leased", name="cache", dns=(), addresses=("10.91.0.77",))
    kept = make_guest("leased", name="db", dns=(), mac="02:00:00:00:00:aa")
    assert addresses_of(first)[0] == "10.91.0.3"
    assert addresses_of(asked)[0] == "10.91.0.77"
    assert addresses_of(kept)[0] == "10.91.0.2"
    assert "02:00:00:00:00:aa" in kept.run("ip", "link", "show", "eth0").stdout
    assert pings(first, "10.91.0.2")
    assert resolve(first, "db")[0] == "10.91.0.2"


_COUNT = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 9), timeout=20) as s:
    start, sent = time.monotonic(), 0
    while time.monotonic() - start < 3:
        sent += s.send(b"x" * 65536)
    s.shutdown(socket.SHUT_WR)
    print(int(s.recv(100)) / (time.monotonic() - start))
"""


def test_bandwidth_is_bounded_and_counted(make_guest: MakeGuest, peer: Peer) -> None:
    bound = 4 << 20
    one = make_guest(
        "nat", name="slow", dns=(), rate=Rate(send_bytes_per_s=bound, receive_bytes_per_s=bound)
    )
    rate = float(one.python(_COUNT, peer.v4))
    # Over three seconds, the first of which may have twice as much.
    assert bound * 0.3 < rate < bound * 1.5
    member, lives = Store().members("nat")[0]
    assert lives
    from ringfence.network.links import statistics  # noqa: PLC0415 - for this test alone

    counted = statistics(member.link)
    assert counted["sent_bytes"] > 2 * rate
    assert counted["received_frames"] > 10


def test_what_passes_is_captured_as_pcap(make_guest: MakeGuest, peer: Peer) -> None:
    one = make_guest("nat", dns=())
    ended = threading.Event()
    file = io.BytesIO()
    spec = Store().find("nat")
    job = threading.Thread(target=capture, args=(bridge_of(spec), file, ended.is_set))
    job.start()
    time.sleep(0.3)
    assert ask(one, peer.v4, 7) == "hello"
    time.sleep(0.5)
    ended.set()
    job.join()
    data = file.getvalue()
    assert struct.unpack_from("<IHH", data) == (0xA1B2C3D4, 2, 4)
    at, frames = 24, []
    while at < len(data):
        size = struct.unpack_from("<I", data, at + 8)[0]
        frames.append(data[at + 16 : at + 16 + size])
        at += 16 + size
    assert any(b"hello" in frame for frame in frames)
    assert at == len(data)


def test_published_ports_stay_when_machines_come_and_go(
    make_guest: MakeGuest, serving: list[subprocess.Popen[str]]
) -> None:
    from ringfence.network import PublishedPort  # noqa: PLC0415 - for this test alone

    one = make_guest("nat", name="one", dns=(), publish=(PublishedPort(host=0, guest=8000),))
    serve(one, serving)
    port = one.attachment.published[0].host
    other = make_guest("nat", name="other", dns=())
    other.close()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        link.sendall(b"hello")
        assert link.recv(100).startswith(b"guest hello")


_RAW = """
import socket, sys
from binascii import unhexlify
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
own = s.getsockname()[4]
for n in range(int(sys.argv[1])):
    mac = b"\\x02\\0\\0" + n.to_bytes(3, "big")
    s.send(b"\\xff" * 6 + mac + b"\\x08\\x06" + unhexlify("0001080006040002") + mac
           + socket.inet_aton(sys.argv[2]) + own + socket.inet_aton(sys.argv[3]) + bytes(18))
    # In a tag of another network, which a bridge would pass on.
    s.send(b"\\xff" * 6 + own + b"\\x81\\0\\0\\x01\\x08\\x06" + unhexlify("0001080006040002") + own
           + socket.inet_aton(sys.argv[2]) + own + socket.inet_aton(sys.argv[3]) + bytes(14))
"""


def test_a_flood_of_others_addresses_reaches_nobody(make_guest: MakeGuest) -> None:
    victim = make_guest("nat", name="victim", dns=())
    liar = make_guest("nat", name="liar", dns=())
    first = victim.attachment.interface.gateways[0]
    assert pings(victim, first)
    spec = Store().find("nat")
    liar.python(_RAW, "3000", first, addresses_of(victim)[0])
    known = victim.run("ip", "neigh", "show", first).stdout
    assert pings(victim, first)
    assert victim.run("ip", "neigh", "show", first).stdout.split()[4] == known.split()[4]
    assert refusals(spec)["counts"]["spoofed"] >= 6000  # type: ignore[index]
    learned = _fdb(bridge_of(spec))
    assert not [line for line in learned if line.startswith("02:00:00:")]


def _fdb(bridge: str) -> list[str]:
    import subprocess  # noqa: PLC0415 - for this test alone

    done = subprocess.run(
        ["bridge", "fdb", "show", "br", bridge], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_routes_to_a_network_are_told(make_guest: MakeGuest) -> None:
    make_guest("routed:10.92.0.0/24", dns=())
    routes = describe(Store().find("routed-10.92.0.0_24"))["routes"]
    assert isinstance(routes, list)
    assert routes[0].startswith("ip route add 10.92.0.0/24 via ")

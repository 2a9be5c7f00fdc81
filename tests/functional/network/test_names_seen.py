"""Names that connections show, in networks of the host's kernel: they must be ones that may be reached."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.network import Policy, addresses, gateway, manage
from ringfence.network.kernel import refusals
from ringfence.network.store import NetworkSpec, Store
from ringfence.network.user import control_path
from tests.functional.network.test_shared import addresses as addresses_of
from tests.functional.network.test_user import ask, ask_udp, resolve

if TYPE_CHECKING:
    from tests.framework.networks import Namespace, Peer
    from tests.functional.network.conftest import Guest, MakeGuest

pytestmark = [pytest.mark.root, pytest.mark.netns]

_WEB = "GET / HTTP/1.0\r\nHost: {}\r\n\r\n"
_RESET = "ConnectionResetError"


@pytest.fixture(autouse=True)
def _names(tmp_path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's name server is the peer: all names below ``example`` have its addresses."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {peer.v4}\n")
    monkeypatch.setattr(addresses, "_RESOLV", resolv)


def _web(guest: Namespace, address: str, host: str) -> str:
    answer = ask(guest, address, 80, _WEB.format(host))
    return "answered" if "200 OK" in answer else answer


_TLS = """
import socket, ssl, sys
host, name, size = sys.argv[1:4]
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
# Many protocols make a first message of several segments.
context.set_alpn_protocols(["x" * 200 + str(n) for n in range(int(size))])
try:
    context.wrap_socket(socket.create_connection((host, 443), timeout=5), server_hostname=name)
except ssl.SSLError:
    print("answered")
except OSError as error:
    print(type(error).__name__)
"""


def assert_names_decide(guest: Namespace, address: str, seen: str) -> None:
    """At a shared address good.example alone is open, by HTTP and TLS; ``seen`` is where from."""
    assert f"{seen} good.example" in ask(guest, address, 80, _WEB.format("good.example"))
    assert _web(guest, address, "evil.example") == _RESET
    for size in ("1", "30"):
        assert guest.python(_TLS, address, "good.example", size) == "answered"
        assert guest.python(_TLS, address, "evil.example", size) == _RESET
    # Without any name.
    assert ask(guest, address, 80, "GET / HTTP/1.0\r\n\r\n") == _RESET


@pytest.mark.parametrize("mode", ["nat", "routed"])
def test_an_address_that_names_share_is_open_for_the_allowed_one_alone(
    make_guest: MakeGuest, peer: Peer, mode: str
) -> None:
    manage.create(NetworkSpec(name="named", mode=mode, allow=("good.example",)))
    one = make_guest("named", name="one", dns=())
    seen_as = ["198.51.100.1", "2001:db8:9::1"]
    if mode == "routed":
        _route_back(peer, one)
        seen_as = addresses_of(one)
    assert resolve(one, "good.example") == [peer.v4, peer.v6]
    for address, seen in zip((peer.v4, peer.v6), seen_as, strict=True):
        assert_names_decide(one, address, seen)
        # QUIC hides it.
        assert ask_udp(one, address, 443) in ("OSError", "PermissionError")
    found = refusals(Store().find("named"))
    counts = found["counts"]
    assert isinstance(counts, dict)
    assert (counts["name"], counts["no_name"]) == (6, 4)
    assert {"one"} == {entry["port"] for entry in found["recent"]}  # type: ignore[attr-defined]
    assert "evil.example" in str(found["recent"])


_MARKS = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("eth0", 0))
s.settimeout(3)
print("ready", flush=True)
marks = set()
while len(marks) < 100:
    try:
        frame = s.recv(65536)
    except TimeoutError:
        break
    if frame[12:14] == b"\\x08\\0" and frame[23] == 6 and frame[36:38] == b"\\0\\x50":
        marks.add(frame[15])
print(marks)
"""


def test_no_packet_leaves_with_a_mark(make_guest: MakeGuest, peer: Peer) -> None:
    one = make_guest("routed:10.94.0.0/24", dns=(), policy=Policy(allow=["good.example"]))
    _route_back(peer, one)
    resolve(one, "good.example")
    looking = peer.spawn("python3", "-c", _MARKS)
    assert looking.stdout is not None
    assert looking.stdout.readline() == "ready\n"
    assert _web(one, peer.v4, "good.example") == "answered"
    assert looking.communicate()[0] == "{0}\n"


def _route_back(peer: Peer, guest: Guest) -> None:
    v4, v6 = addresses_of(guest)
    peer.run("ip", "route", "replace", f"{v4}/32", "via", "198.51.100.1")
    peer.run("ip", "-6", "route", "replace", f"{v6}/128", "via", "2001:db8:9::1")


def test_a_denied_name_is_refused_wherever_it_shows(make_guest: MakeGuest, peer: Peer) -> None:
    one = make_guest("nat", name="one", dns=(), policy=Policy(deny=["*.evil.example"]))
    two = make_guest("nat", name="two", dns=())
    for address in (peer.v4, peer.v6):
        assert _web(one, address, "a.evil.example") == _RESET
        assert _web(one, address, "good.example") == "answered"
        assert ask(one, address, 7) == "hello"
        assert _web(two, address, "a.evil.example") == "answered"
    # What is refused anyway is refused before it is looked at.
    assert ask(one, "169.254.169.254", 80) == "ConnectionRefusedError"


def test_rules_of_network_and_machine_about_names_hold_together(
    make_guest: MakeGuest, peer: Peer
) -> None:
    manage.create(NetworkSpec(name="both", mode="nat", allow=("*.example",)))
    one = make_guest("both", dns=(), policy=Policy(allow=["good.example"]))
    two = make_guest("both", dns=(), policy=Policy(deny=[f"{peer.v4}:80"]))
    three = make_guest("both", dns=(), policy=Policy(allow=[peer.v4]))
    for guest in (one, two):
        resolve(guest, "good.example")
    assert _web(one, peer.v4, "good.example") == "answered"
    assert _web(one, peer.v4, "other.example") == _RESET
    assert _web(two, peer.v4, "good.example") == "ConnectionRefusedError"
    assert _web(two, peer.v6, "other.example") == "answered"
    assert _web(two, peer.v6, "other.test") == _RESET
    assert _web(three, peer.v4, "other.example") == "answered"
    assert _web(three, peer.v4, "other.test") == _RESET


_WHOLE = """
import socket, sys, threading
host = sys.argv[1]
with socket.create_connection((host, 25), timeout=5) as s:
    assert s.recv(100) == b"welcome"
    s.sendall(b"hello")
    assert s.recv(100) == b"hello"
with socket.create_connection((host, 9), timeout=20) as s:
    for _ in range(200):
        s.sendall(b"x" * 100_000)
    s.shutdown(socket.SHUT_WR)
    assert s.recv(100) == b"20000000"
with socket.create_connection((host, 19), timeout=20) as s:
    s.sendall(b"20000000\\n")
    got = 0
    while data := s.recv(1 << 16):
        got += len(data)
    assert got == 20_000_000, got
try:
    with socket.create_connection((host, 4), timeout=5) as s:
        s.recv(1)
except ConnectionError:
    print("whole")
"""


def test_other_protocols_pass_whole(make_guest: MakeGuest, peer: Peer) -> None:
    one = make_guest("nat", dns=(), policy=Policy(allow=["good.example"]))
    resolve(one, "good.example")
    for address in (peer.v4, peer.v6):
        assert one.python(_WHOLE, address) == "whole"
    with gateway.connect(control_path("nat")) as running:
        deadline = time.monotonic() + 5
        while _connections(running) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (_connections(running), running.status()["buffer_bytes"]) == (0, 0)


def _connections(running: gateway.Gateway) -> int:
    relay = running.status()["relay"]
    assert isinstance(relay, dict)
    return int(relay["connections"])


def test_nothing_passes_while_nobody_looks_and_the_next_change_heals_it(
    make_guest: MakeGuest, peer: Peer
) -> None:
    one = make_guest("nat", name="one", dns=(), policy=Policy(allow=["good.example"]))
    resolve(one, "good.example")
    assert _web(one, peer.v4, "good.example") == "answered"
    with gateway.connect(control_path("nat")) as running:
        pid = int(str(running.status()["pid"]))
    os.kill(pid, signal.SIGKILL)
    assert _web(one, peer.v4, "good.example") == "ConnectionRefusedError"
    two = make_guest("nat", name="two", dns=())
    assert _web(one, peer.v4, "good.example") == "answered"
    assert _web(one, peer.v4, "evil.example") == _RESET
    with gateway.connect(control_path("nat")) as running:
        pid = int(str(running.status()["pid"]))
    two.close()
    one.close()
    deadline = time.monotonic() + 5
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(pid)
    assert not control_path("nat").exists()


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_guest_reaches_the_door_itself_in_no_way(make_guest: MakeGuest, peer: Peer) -> None:
    one = make_guest("nat", dns=(), policy=Policy(allow=["good.example"]))
    resolve(one, "good.example")
    with gateway.connect(control_path("nat")) as running:
        relay = running.status()["relay"]
    assert isinstance(relay, dict)
    for text in relay["listening"]:
        address, _, port = text.rpartition(":")
        assert ask(one, address.strip("[]"), int(port)) == "ConnectionRefusedError"
        assert not ask(peer, address.strip("[]"), int(port)).startswith("hello")

"""The mode ``user``: a Linux stack in a namespace behind a gateway, and a host outside."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConflictError
from ringfence.network import Policy, PublishedPort, Rate, gateway
from ringfence.network.user import control_path

if TYPE_CHECKING:
    from tests.framework.networks import Namespace, Peer
    from tests.functional.network.conftest import Guest, MakeGuest

pytestmark = [pytest.mark.root, pytest.mark.netns]

_ASK = """
import socket, sys
host, port, text = sys.argv[1:4]
try:
    with socket.create_connection((host, int(port)), timeout=5) as s:
        s.sendall(text.encode())
        print(s.recv(65536).decode())
except OSError as error:
    print(type(error).__name__)
"""

_ASK_UDP = """
import socket, sys
host, port, text = sys.argv[1:4]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as s:
    s.settimeout(2)
    s.connect((host, int(port)))
    try:
        s.send(text.encode())
        print(s.recv(65536).decode())
    except OSError as error:
        print(type(error).__name__)
"""


def ask(guest: Namespace, host: str, port: int, text: str = "hello") -> str:
    return guest.python(_ASK, host, str(port), text)


def ask_udp(guest: Namespace, host: str, port: int, text: str = "hello") -> str:
    return guest.python(_ASK_UDP, host, str(port), text)


def resolve(guest: Guest, name: str) -> list[str]:
    """What a name server answers to a question of the guest's own making, A and AAAA."""
    source = """
import socket, sys, struct
server, name = sys.argv[1:3]
found = []
for kind in (1, 28):
    q = b"\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0"
    q += b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\\0"
    q += struct.pack(">HH", kind, 1)
    by_tcp = sys.argv[3] == "tcp"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if by_tcp else socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.connect((server, 53))
        s.send((len(q).to_bytes(2, "big") if by_tcp else b"") + q)
        a = s.recv(4096)
        if by_tcp:
            while len(a) < 2 or len(a) < 2 + int.from_bytes(a[:2], "big"):
                a += s.recv(4096)
            a = a[2:]
    assert a[:2] == q[:2], a
    if a[3] & 15: found.append(f"code {a[3] & 15}")
    elif a[2] & 2: found.append("truncated")
    elif a[7]:
        d = a[len(q) + 12:]
        family = socket.AF_INET if kind == 1 else socket.AF_INET6
        found.append(socket.inet_ntop(family, d[: 4 if kind == 1 else 16]))
print(",".join(found))
"""
    transport, _, name = name.rpartition("/")
    dns = guest.attachment.interface.dns[0]
    return guest.python(source, dns, name, transport or "udp").split(",")


@pytest.fixture
def guest(make_guest: MakeGuest) -> Guest:
    return make_guest()


def test_tcp_and_udp_reach_outside_by_both_versions(guest: Guest, peer: Peer) -> None:
    for address in (peer.v4, peer.v6):
        assert ask(guest, address, 7) == "hello"
        assert ask_udp(guest, address, 7) == "hello"


def test_large_datagrams_pass_both_ways(guest: Guest, peer: Peer) -> None:
    for address in (peer.v4, peer.v6):
        assert ask_udp(guest, address, 7, "x" * 20_000) == "x" * 20_000


def test_the_gateway_answers_pings(guest: Guest) -> None:
    for address in guest.attachment.interface.gateways:
        done = guest.run("ping", "-c", "1", "-W", "2", address)
        assert done.returncode == 0, done.stdout


def test_refusals_and_resets_reach_the_guest(guest: Guest, peer: Peer) -> None:
    assert ask(guest, peer.v4, 4) == "ConnectionRefusedError"
    assert ask(guest, peer.v6, 4) == "ConnectionRefusedError"
    assert ask(guest, peer.v4, 81) in ("ConnectionResetError", "BrokenPipeError")
    assert ask_udp(guest, peer.v4, 4) == "ConnectionRefusedError"


_HALF_CLOSE = """
import socket, sys
with socket.create_connection((sys.argv[1], 9), timeout=30) as s:
    for _ in range(64):
        s.sendall(b"x" * 100_000)
    s.shutdown(socket.SHUT_WR)
    print(s.recv(100).decode())
"""


def test_one_side_may_end_first(guest: Guest, peer: Peer) -> None:
    for address in (peer.v4, peer.v6):
        assert guest.python(_HALF_CLOSE, address) == "6400000"


_PULL = """
import socket, sys, time, zlib
size = int(sys.argv[2])
with socket.create_connection((sys.argv[1], 19), timeout=30) as s:
    s.sendall(b"%d\\n" % size)
    crc = got = 0
    while data := s.recv(1 << 16):
        got += len(data)
        crc = zlib.crc32(data, crc)
        if got < 3_000_000: time.sleep(0.002)
print(got, crc)
"""


def test_bytes_come_whole_and_in_order_to_a_slow_reader(guest: Guest, peer: Peer) -> None:
    import zlib  # noqa: PLC0415 - for this test

    size = 20_000_000
    pattern = bytes(range(256)) * 256
    whole = pattern * (size // len(pattern)) + pattern[: size % len(pattern)]
    assert guest.python(_PULL, peer.v6, str(size)) == f"{size} {zlib.crc32(whole)}"


_MANY = """
import socket, sys
host, count = sys.argv[1], int(sys.argv[2])
many = [socket.create_connection((host, 7), timeout=30) for _ in range(count)]
for number, one in enumerate(many):
    one.sendall(b"%d" % number)
good = sum(one.recv(100) == b"%d" % number for number, one in enumerate(many))
print(good)
"""


def test_a_thousand_connections_at_once_leave_nothing_behind(guest: Guest, peer: Peer) -> None:
    source = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n" + _MANY
    assert guest.python(source, peer.v4, "1000") == "1000"
    with gateway.connect(control_path(guest.id)) as control:
        deadline = time.monotonic() + 10
        while control.status()["tcp_connections"] and time.monotonic() < deadline:
            guest.run("sleep", "0.1")
        status = control.status()
        assert (status["tcp_connections"], status["buffer_bytes"]) == (0, 0)


def test_names_are_forwarded_by_udp_and_tcp(guest: Guest, peer: Peer) -> None:
    both = [peer.v4, peer.v6]
    assert resolve(guest, "www.example") == both
    assert resolve(guest, "tcp/www.example") == both
    assert resolve(guest, "big.example") == ["truncated", "truncated"]
    assert resolve(guest, "tcp/big.example") == both
    assert resolve(guest, "nx.example") == ["code 3", "code 3"]


def test_own_names_are_answered(make_guest: MakeGuest) -> None:
    guest = make_guest(name="box", hosts={"db.test": "192.0.2.9"})
    own = [text.partition("/")[0] for text in guest.attachment.interface.addresses]
    assert resolve(guest, "box") == own
    assert resolve(guest, "db.test") == ["192.0.2.9"]


def test_the_hosts_loopback_and_metadata_are_closed(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        gateway_v4 = guest.attachment.interface.gateways[0]
        assert ask(guest, gateway_v4, port) == "ConnectionRefusedError"
    assert ask(guest, "169.254.169.254", 80) == "ConnectionRefusedError"
    with gateway.connect(control_path(guest.id)) as control:
        refusals = control.refusals()
    assert refusals["counts"] == {"closed": 2}
    assert "metadata" in str(refusals["recent"])


def test_an_opened_port_of_the_host_is_reached_at_the_gateway(make_guest: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        guest = make_guest(policy=Policy(allow=f"host:{port}"))
        own = guest.attachment.interface.gateways[0]
        source = f"import socket; socket.create_connection(('{own}', {port})); print('in')"
        assert guest.python(source) == "in"


def test_rules_for_ranges_and_ports(make_guest: MakeGuest, peer: Peer) -> None:
    guest = make_guest(policy=Policy(allow=[f"{peer.v4}:7"], deny=[peer.v6]))
    assert ask(guest, peer.v4, 7) == "hello"
    assert ask(guest, peer.v4, 80) == "ConnectionRefusedError"
    assert ask(guest, peer.v6, 7) == "ConnectionRefusedError"
    assert resolve(guest, "www.example") == ["code 5", "code 5"]


def test_rules_change_while_the_machine_runs(guest: Guest, peer: Peer) -> None:
    assert ask(guest, peer.v4, 7) == "hello"
    with gateway.connect(control_path(guest.id)) as control:
        control.call("set_policy", Policy(deny="any").document())
        assert ask(guest, peer.v4, 7) == "ConnectionRefusedError"
        control.call("set_policy", Policy().document())
    assert ask(guest, peer.v4, 7) == "hello"


def test_names_open_what_was_answered_for_them(make_guest: MakeGuest, peer: Peer) -> None:
    guest = make_guest(policy=Policy(allow=["good.example", "*.wild.example"]))
    # Before it was asked for, the address is like any other.
    assert ask(guest, peer.v4, 7) == "ConnectionRefusedError"
    assert resolve(guest, "evil.example") == ["code 5", "code 5"]
    assert resolve(guest, "a.wild.example") == [peer.v4, peer.v6]
    assert ask(guest, peer.v4, 7) == "hello"
    web = "GET / HTTP/1.1\r\nHost: {}\r\n\r\n"
    assert "200 OK" in ask(guest, peer.v4, 80, web.format("b.wild.example"))
    assert ask(guest, peer.v4, 80, web.format("evil.example")) == "ConnectionResetError"
    # An answer that points into the host opens nothing.
    rebound = make_guest(policy=Policy(allow=["rebind.example"]))
    assert resolve(rebound, "rebind.example")[0] == "127.0.0.1"
    assert ask(rebound, "127.0.0.1", 22) == "ConnectionRefusedError"


def test_a_tls_name_must_agree(make_guest: MakeGuest, peer: Peer) -> None:
    guest = make_guest(policy=Policy(allow=["good.example"]))
    resolve(guest, "good.example")
    source = """
import socket, ssl, sys
host, name = sys.argv[1:3]
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
try:
    context.wrap_socket(socket.create_connection((host, 443), timeout=5), server_hostname=name)
except ssl.SSLError:
    print("heard")
except OSError as error:
    print(type(error).__name__)
"""
    assert guest.python(source, peer.v4, "good.example") == "heard"
    assert guest.python(source, peer.v4, "evil.example") == "ConnectionResetError"


def test_published_ports_reach_the_guest(make_guest: MakeGuest) -> None:
    ports = (
        PublishedPort(host=0, guest=8000),
        PublishedPort(host=0, guest=8000, transport="udp"),
        PublishedPort(host=0, guest=8000, address="::1"),
    )
    guest = make_guest(publish=ports)
    source = """
import socket, threading
t = socket.create_server(("::", 8000), family=socket.AF_INET6, dualstack_ipv6=True)
u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); u.bind(("::", 8000))
def answer():
    while True:
        data, peer = u.recvfrom(1000); u.sendto(b"udp " + data, peer)
threading.Thread(target=answer, daemon=True).start()
print("ready", flush=True)
while True:
    s, _ = t.accept(); s.sendall(b"tcp " + s.recv(1000)); s.close()
"""
    server = guest.spawn("python3", "-c", source)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    try:
        tcp, udp, tcp6 = (port.host for port in guest.attachment.published)
        for host, port in (("127.0.0.1", tcp), ("::1", tcp6)):
            with socket.create_connection((host, port), timeout=5) as one:
                one.sendall(b"hello")
                assert one.recv(100) == b"tcp hello"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.settimeout(5)
            one.sendto(b"hello", ("127.0.0.1", udp))
            assert one.recv(100) == b"udp hello"
    finally:
        server.kill()
        server.communicate()


def test_a_guest_may_speak_first_at_a_published_port(make_guest: MakeGuest) -> None:
    guest = make_guest(publish=(PublishedPort(host=0, guest=8000),))
    source = """
import socket
t = socket.create_server(("", 8000))
print("ready", flush=True)
while True:
    s, _ = t.accept(); s.sendall(b"welcome"); s.close()
"""
    server = guest.spawn("python3", "-c", source)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    try:
        start = time.monotonic()
        for _ in range(5):
            port = guest.attachment.published[0].host
            with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
                assert one.recv(100) == b"welcome"
        # A guest that heard nothing would send its answer again after a second.
        assert time.monotonic() - start < 2.5
    finally:
        server.kill()
        server.communicate()


def test_a_port_in_use_is_said_and_nothing_is_left(make_guest: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = PublishedPort(host=taken.getsockname()[1], guest=80)
        with pytest.raises(ConflictError, match="in use"):
            make_guest(publish=(port,))
    assert not list(control_path("x").parent.glob("*.sock"))


def test_frames_in_others_names_are_dropped(guest: Guest) -> None:
    # A second address that nobody gave it, by both versions.
    guest.run("ip", "addr", "add", "10.0.2.77/24", "dev", "eth0")
    gateway_v4 = guest.attachment.interface.gateways[0]
    done = guest.run("ping", "-c", "1", "-W", "1", "-I", "10.0.2.77", gateway_v4)
    assert done.returncode != 0
    guest.run("ip", "link", "set", "eth0", "address", "02:00:00:00:00:66")
    done = guest.run("ping", "-c", "1", "-W", "1", gateway_v4)
    assert done.returncode != 0
    with gateway.connect(control_path(guest.id)) as control:
        port = control.status()["ports"][0]  # type: ignore[index]
    assert port["counters"]["spoofed_frames"] > 1


def test_an_address_is_told_by_dhcp(guest: Guest) -> None:
    source = """
import socket, struct, sys
mac = sys.argv[1].replace(":", "")
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
s.bind(("", 68)); s.settimeout(3)
m = struct.pack(">BBBBIHH16s16s192sI", 1, 1, 6, 0, 7, 0, 0x8000, b"", bytes.fromhex(mac), b"", 0x63825363)
s.sendto(m + b"\\x35\\1\\1\\xff", ("255.255.255.255", 67))
a = s.recv(2000)
print(socket.inet_ntoa(a[16:20]), a[242])
"""
    own = guest.attachment.interface.addresses[0].partition("/")[0]
    assert guest.python(source, guest.attachment.interface.mac) == f"{own} 2"


def test_the_gateway_has_given_everything_up(guest: Guest) -> None:
    with gateway.connect(control_path(guest.id)) as control:
        pid = control.status()["pid"]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")


def test_bandwidth_is_bounded_each_way(make_guest: MakeGuest, peer: Peer) -> None:
    rate = Rate(send_bytes_per_s=2_000_000, receive_bytes_per_s=2_000_000)
    guest = make_guest(rate=rate)
    begin = time.monotonic()
    assert guest.python(_PULL, peer.v4, "5000000").startswith("5000000")
    # A burst of a second passes at once.
    assert time.monotonic() - begin > 1.2
    begin = time.monotonic()
    assert guest.python(_HALF_CLOSE, peer.v4) == "6400000"
    assert time.monotonic() - begin > 1.8


def test_a_capture_is_a_pcap_of_what_passed(guest: Guest, peer: Peer, home: Path) -> None:
    path = home / "x.pcap"
    with gateway.connect(control_path(guest.id)) as control, path.open("wb") as file:
        control.call("capture_start", {"fd": 0, "port": None}, [file.fileno()])
        ask(guest, peer.v4, 7, "find me")
        control.call("capture_stop")
    data = path.read_bytes()
    assert data[:4] in (b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d")
    assert data.count(b"find me") == 2

"""What hostile machines on a LAN do: they answer nobody unasked, and are nobody else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ringfence.network import Policy, manage
from ringfence.network.kernel import refusals
from ringfence.network.store import Store
from tests.framework.lan import HOST4, HOST6, PEER4, Lan
from tests.functional.network.test_kernel_rules import _RAW
from tests.functional.network.test_lan_names import SERVES, guest_on, lan
from tests.functional.network.test_user import ask, ask_udp

if TYPE_CHECKING:
    from tests.functional.network.conftest import MakeGuest

__all__ = ["lan"]

pytestmark = [pytest.mark.root, pytest.mark.netns]

_BARE = """
import socket, struct, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
own = s.getsockname()[4]
router = bytes.fromhex(sys.argv[3].replace(":", ""))
def sum16(data):
    data += b"\\0" * (len(data) % 2)
    n = sum(struct.unpack(f">{len(data) // 2}H", data))
    while n >> 16: n = (n & 0xffff) + (n >> 16)
    return ~n & 0xffff
def send(protocol, body, piece=0):
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 7, piece, 64, protocol, 0,
                     socket.inet_aton(sys.argv[1]), socket.inet_aton(sys.argv[2]))
    ip = ip[:10] + struct.pack(">H", sum16(ip)) + ip[12:]
    for tag in (b"", b"\\x81\\0\\0\\x01"):
        s.send(router + own + tag + b"\\x08\\0" + ip + body)
def tcp(flags): return struct.pack(">HHIIBBHHH", 40000, 80, 1, 1, 0x50, flags, 1000, 0, 0)
# Answers to nobody, what is in pieces, and echoes that nobody asked for.
for flags in (0x10, 0x12, 0x04, 0x01): send(6, tcp(flags) + b"secret")
send(6, tcp(0x10)[:8], 0x2000)
send(6, tcp(0x02)[8:] + b"secret", 0x0001)
send(1, b"\\0\\0\\0\\0\\0\\1\\0\\1secret")
send(1, b"\\3\\0\\0\\0\\0\\0\\0\\0secret")
send(17, struct.pack(">HHHH", 68, 67, 14, 0) + b"secret")
send(17, struct.pack(">HHHH", 53, 5000, 14, 0) + b"secret")
send(47, b"secret")
"""
_SEES = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("eth0", 0))
s.settimeout(3)
print("ready", flush=True)
seen = 0
while True:
    try: frame = s.recv(65536)
    except TimeoutError: break
    seen += b"secret" in frame or frame[34:38] == b"\\x9c\\x40\\0\\x50"
print(seen)
"""


@pytest.mark.parametrize("rules", [Policy(allow=["good.example"]), Policy(allow=["10.93.0.50"])])
def test_what_answers_nobody_reaches_nobody(make_guest: MakeGuest, lan: Lan, rules: Policy) -> None:
    one = guest_on(make_guest, lan, policy=rules)
    looking = lan.peer.spawn("python3", "-c", _SEES)
    assert looking.stdout is not None
    assert looking.stdout.readline() == "ready\n"
    link = lan.peer.run("cat", "/sys/class/net/eth0/address").stdout.strip()
    # Somebody whom no test hears from.
    one.python(_BARE, "10.93.0.77", "203.0.113.77", link)
    assert looking.communicate()[0] == "0\n"
    # Others reach it, and hear its answers, by UDP as well.
    assert lan.peer.run("ping", "-c", "1", "-W", "1", "10.93.0.77").returncode == 0
    assert lan.peer.run("ping", "-6", "-c", "1", "-W", "1", "fd00:93::77").returncode == 0
    serving = one.spawn("python3", "-c", SERVES)
    assert serving.stdout is not None
    assert serving.stdout.readline() == "ready\n"
    assert ask_udp(lan.peer, "10.93.0.77", 7000) == "hello"
    assert ask(lan.peer, "10.93.0.77", 7000) == "hello"
    serving.kill()
    serving.communicate()


def test_a_machine_is_not_this_host(make_guest: MakeGuest, lan: Lan) -> None:
    one = guest_on(make_guest, lan)
    one.run("ip", "addr", "add", f"{HOST4}/24", "dev", "eth0")
    one.run("ip", "-6", "addr", "add", f"{HOST6}/64", "dev", "eth0", "nodad")
    one.python(_RAW, "3", HOST4, PEER4)
    for address in (HOST4, HOST6):
        lan.peer.run("ip", "neigh", "flush", "to", address)
        assert lan.peer.run("ping", "-c", "2", "-W", "1", address).returncode == 0
        heard = lan.peer.run("ip", "neigh", "show", address).stdout
        assert one.attachment.interface.mac not in heard
    assert _spoofed(lan) > 0


def _spoofed(lan: Lan) -> int:
    counts = refusals(Store().find(f"bridge-{lan.interface}"))["counts"]
    assert isinstance(counts, dict)
    return int(counts.get("spoofed", 0))


_CLAIM = """
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
own, claimed = s.getsockname()[4], socket.inet_aton(sys.argv[1])
body = bytes.fromhex("0001080006040002") + own + claimed + b"\\xff" * 6 + claimed
for _ in range(3): s.send(b"\\xff" * 6 + own + b"\\x08\\x06" + body + bytes(18))
"""


def test_a_machine_is_nobody_else_on_the_lan(make_guest: MakeGuest, lan: Lan) -> None:
    """What it was given is its own; and a VM, which may ask for others, is not the LAN's router."""
    one = guest_on(make_guest, lan)
    network = f"bridge-{lan.interface}"

    def refused(address: str) -> int:
        before = _spoofed(lan)
        one.python(_CLAIM, address)
        return _spoofed(lan) - before

    mine, other = "10.93.0.77", "10.93.0.60"
    assert [refused(address) for address in (mine, other, HOST4, PEER4)] == [0, 3, 3, 3]
    member, _ = Store().members(network)[0]
    assert member.held
    Store().rewrite(network, replace(member, held=False))
    # The host knows who its name server is.
    assert lan.peer.run("ping", "-c", "1", "-W", "1", HOST4).returncode == 0
    manage.set_policy(network, Policy())
    assert [refused(address) for address in (mine, other, HOST4, PEER4)] == [0, 0, 3, 3]

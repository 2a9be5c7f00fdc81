"""What a hostile machine says to its neighbours in others' names doesn't reach them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tests.functional.network.test_shared import addresses

if TYPE_CHECKING:
    from tests.framework.networks import Peer
    from tests.functional.network.conftest import MakeGuest

pytestmark = [pytest.mark.root, pytest.mark.netns]

# What comes from one Ethernet address: UDP by its ports, ICMPv6 by its type, ARP by whose it is.
_LISTEN = """
import socket, sys, time
liar = bytes.fromhex(sys.argv[1].replace(":", ""))
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("eth0", 0))
s.settimeout(0.5)
print("ready", flush=True)
seen, end = set(), time.monotonic() + 20
while time.monotonic() < end and "udp 9999 9999" not in seen:
    try: f = s.recv(65536)
    except TimeoutError: continue
    if f[6:12] != liar and f[22:28] != liar: continue
    if f[12:14] == b"\\x08\\0" and f[23] == 17:
        seen.add(f"udp {int.from_bytes(f[34:36], 'big')} {int.from_bytes(f[36:38], 'big')}")
        if f[26:30] == socket.inet_aton(sys.argv[2]): seen.add("as the gateway")
    elif f[12:14] == b"\\x86\\xdd" and f[20] == 58 and f[54] in (134, 137): seen.add(f"icmp {f[54]}")
    elif f[12:14] == b"\\x08\\x06" and f[28:32] == socket.inet_aton(sys.argv[2]): seen.add("arp")
print(sorted(seen))
"""

# An answer of a DHCP server, a router's advertisement and redirect, the gateway's address claimed
# by ARP, a name server's answer from the gateway's address; and last something harmless.
_LIE = """
import socket, struct, sys
victim, first, victim_mac = sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3].replace(":", ""))
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
own = s.getsockname()[4]
def sum16(data):
    data += b"\\0" * (len(data) % 2)
    n = sum(struct.unpack(f">{len(data) // 2}H", data))
    while n >> 16: n = (n & 0xffff) + (n >> 16)
    return ~n & 0xffff
def udp(source, sport, dport, body):
    head = struct.pack(">HHHH", sport, dport, 8 + len(body), 0)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28 + len(body), 0, 0, 64, 17, 0,
                     socket.inet_aton(source), socket.inet_aton(victim))
    ip = ip[:10] + struct.pack(">H", sum16(ip)) + ip[12:]
    s.send(victim_mac + own + b"\\x08\\0" + ip + head + body)
def icmp6(kind):
    source = socket.inet_pton(socket.AF_INET6, sys.argv[4])
    target = socket.inet_pton(socket.AF_INET6, "ff02::1")
    body = bytes([kind, 0, 0, 0, 64, 0, 7, 8]) + bytes(32)
    pseudo = source + target + struct.pack(">II", len(body), 58)
    body = body[:2] + struct.pack(">H", sum16(pseudo + body)) + body[4:]
    ip = struct.pack(">IHBB", 0x60000000, len(body), 58, 255) + source + target
    s.send(b"\\x33\\x33\\0\\0\\0\\1" + own + b"\\x86\\xdd" + ip + body)
me = sys.argv[5]
for _ in range(3):
    udp(me, 67, 68, bytes(300))
    udp(first, 53, 40000, bytes(40))
    icmp6(134)
    icmp6(137)
    s.send(b"\\xff" * 6 + own + b"\\x08\\x06" + bytes.fromhex("0001080006040002") + own
           + socket.inet_aton(first) + victim_mac + socket.inet_aton(victim) + bytes(18))
udp(me, 9999, 9999, b"harmless")
"""


@pytest.mark.parametrize("network", ["nat", "isolated"])
def test_neighbours_hear_no_false_servers_and_routers(make_guest: MakeGuest, network: str) -> None:
    victim = make_guest(network, name="victim", dns=())
    liar = make_guest(network, name="liar", dns=())
    first = victim.attachment.interface.dns[0]
    mac = liar.attachment.interface.mac
    listening = victim.spawn("python3", "-c", _LISTEN, mac, first)
    assert listening.stdout is not None
    assert listening.stdout.readline() == "ready\n"
    link = liar.run("ip", "-o", "addr", "show", "dev", "eth0", "scope", "link").stdout.split()[3]
    victim_mac = victim.attachment.interface.mac
    words = (addresses(victim)[0], first, victim_mac, link.partition("/")[0], addresses(liar)[0])
    liar.python(_LIE, *words)
    assert listening.communicate()[0] == "['udp 9999 9999']\n"


# A datagram for the host, to each of the Ethernet addresses that bridges keep to themselves.
_TO_GROUPS = """
import socket, struct, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
def sum16(data):
    n = sum(struct.unpack(f">{len(data) // 2}H", data))
    while n >> 16: n = (n & 0xffff) + (n >> 16)
    return ~n & 0xffff
body = struct.pack(">HHHH", 9, int(sys.argv[3]), 12, 0) + b"past"
ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0,
                 socket.inet_aton(sys.argv[1]), socket.inet_aton(sys.argv[2]))
ip = ip[:10] + struct.pack(">H", sum16(ip)) + ip[12:]
for low in range(16):
    s.send(bytes.fromhex(f"0180c20000{low:02x}") + s.getsockname()[4] + b"\\x08\\0" + ip + body + bytes(18))
"""


def test_the_groups_of_bridges_are_no_way_past_the_rules(make_guest: MakeGuest, peer: Peer) -> None:
    liar = make_guest("nat", dns=())
    host = peer.v4[:-1] + "1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard:
        heard.bind((host, 0))
        heard.settimeout(5)
        liar.python(_TO_GROUPS, addresses(liar)[0], host, str(heard.getsockname()[1]))
        heard.sendto(b"all", heard.getsockname())
        assert heard.recv(100) == b"all"

"""What a machine on the host's own network does with vhost-net, and without. Needs root, KVM and vhost-net.

python -m tests.functional.kvm.vhost_checks
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ringfence import Machine
from ringfence.network.capture import capture
from ringfence.network.kernel import describe
from ringfence.network.store import Store
from tests.framework.networks import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

DEVICE = Path("/dev/vhost-net")
SECONDS = 4

# A frame in another's name, to everybody.
_FORGE = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for _ in range(5):
    s.send(bytes.fromhex("ffffffffffff 02aabbccddee 0800".replace(" ", "")) + bytes(60))
"""

# As `ethtool -L eth0 combined N` does (linux/ethtool.h, ETHTOOL_SCHANNELS).
_CHANNELS = """
import ctypes, fcntl, socket, struct, sys
channels = ctypes.create_string_buffer(struct.pack("9I", 0x3d, 0, 0, 0, 0, 0, 0, 0, int(sys.argv[1])))
request = struct.pack("16sQ16x", b"eth0", ctypes.addressof(channels))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)
"""

# The driver lets go of the card and takes it again, as a kernel that was started anew does.
_AGAIN = """
set -e
device=$(basename $(readlink /sys/class/net/eth0/device))
echo $device > /sys/bus/virtio/drivers/virtio_net/unbind
echo $device > /sys/bus/virtio/drivers/virtio_net/bind
ip link set eth0 up
ip addr add {address} dev eth0
ip route add default via {gateway}
"""


def make() -> Machine:
    return Machine(engine="kvm", vcpus=2, memory="256M", network="nat")


def networks(machine: Machine) -> list[dict[str, object]]:
    return cast("list[dict[str, object]]", machine.inspect()["networks"])


def cards(machine: Machine) -> list[dict[str, int]]:
    devices = cast("dict[str, dict[str, int]]", machine.stats()["devices"])
    return [counters for name, counters in devices.items() if name.startswith("net")]


def messages(machine: Machine) -> int:
    """Interrupts that the VM process has sent."""
    counters = cast("dict[str, int]", machine.stats(engine_counters=True)["engine"])
    return counters["interrupts.messages"]


def pings(machine: Machine, peer: Peer) -> None:
    done = machine.run(["ping", "-c", "3", "-i", "0.2", "-W", "5", peer.v4], timeout_s=60)
    assert done.exit_code == 0, done


def transfer(machine: Machine, peer: Peer, *options: str) -> float:
    """Gbit/s by iperf3, out of the machine unless told otherwise."""
    server = peer.spawn("iperf3", "-s", "-1", "-J")
    try:
        argv = ["iperf3", "-J", "-t", str(SECONDS), "-c", peer.v4, *options]
        found: dict[str, dict[str, dict[str, float]]] = {}
        # The server may not listen yet, which iperf3 says in its answer alone.
        for _ in range(20):
            found = json.loads(machine.run(argv, timeout_s=120).stdout)
            if "error" not in found:
                break
        return found["end"]["sum_received"]["bits_per_second"] / 1e9
    finally:
        server.kill()
        server.communicate()


def check_the_kernel_moves_the_frames(machine: Machine, peer: Peer) -> None:
    assert networks(machine)[0]["frames"] == "vhost-net", networks(machine)
    pings(machine, peer)
    # Each of the guest's processors has a pair.
    assert [card["vhost_pairs"] for card in cards(machine)] == [2]
    [member] = [one for one, _ in Store().members("nat")]
    assert member.frames == "vhost-net", member


def check_the_host_reaches_the_machine(machine: Machine, _: Peer) -> None:
    address = str(networks(machine)[0]["addresses"][0]).partition("/")[0]  # type: ignore[index]
    assert os.system(f"ping -c 3 -i 0.2 -W 5 {address} > /dev/null") == 0  # noqa: S605


def check_much_passes_both_ways(machine: Machine, peer: Peer) -> None:
    before, said = cards(machine)[0], messages(machine)
    for options in ((), ("-R",), ("-P", "4"), ("-6", "-c", peer.v6)):
        assert transfer(machine, peer, *options) > 0
    after = cards(machine)[0]
    for name in ("tx_frames", "tx_bytes", "rx_frames", "rx_bytes"):
        assert after[name] > before[name] + 100, (name, before, after)
    # Interrupts go from the kernel to the guest, but for those of other devices.
    frames = after["rx_frames"] - before["rx_frames"]
    assert messages(machine) - said < frames / 10, (messages(machine) - said, frames)


def check_the_driver_may_start_again(machine: Machine, peer: Peer) -> None:
    found = networks(machine)[0]
    address, gateway = found["addresses"][0], found["gateways"][0]  # type: ignore[index]
    for _ in range(3):
        script = _AGAIN.format(address=address, gateway=gateway)
        done = machine.run(["sh", "-c", script], timeout_s=60)
        assert done.exit_code == 0, done
        pings(machine, peer)
    assert [card["vhost_pairs"] for card in cards(machine)] == [2]


def check_the_guest_may_use_fewer_pairs(machine: Machine, peer: Peer) -> None:
    for pairs in (1, 2):
        done = machine.run(["python3", "-c", _CHANNELS, str(pairs)])
        assert done.exit_code == 0, done
        pings(machine, peer)
        assert [card["vhost_pairs"] for card in cards(machine)] == [pairs]


def check_a_paused_machine_goes_on(machine: Machine, peer: Peer) -> None:
    machine.pause()
    machine.resume()
    pings(machine, peer)


def check_forged_frames_are_refused_and_counted(machine: Machine, peer: Peer) -> None:
    done = machine.run(["python3", "-c", _FORGE])
    assert done.exit_code == 0, done
    refused = cast("dict[str, int]", describe(Store().find("nat"))["refused"])
    assert refused["spoofed"] >= 5, refused
    pings(machine, peer)


def check_a_capture_sees_what_passes(machine: Machine, peer: Peer) -> None:
    [member] = [one for one, _ in Store().members("nat")]
    stopped = threading.Event()
    with tempfile.NamedTemporaryFile() as file, ThreadPoolExecutor(1) as pool:
        frames = pool.submit(capture, member.link, cast("BinaryIO", file), stopped.is_set)
        # Its head is there once it listens.
        while not Path(file.name).stat().st_size:
            time.sleep(0.02)
        pings(machine, peer)
        stopped.set()
        assert frames.result() >= 6


def check_cards_come_and_go(machine: Machine, peer: Peer) -> None:
    for _ in range(2):
        answer = machine.connect("host-only")
        assert answer["frames"] == "vhost-net", answer
        gateway = str(ipaddress_of(answer))
        done = machine.run(["ping", "-c", "2", "-W", "5", gateway], timeout_s=60)
        assert done.exit_code == 0, done
        machine.disconnect("host-only")
    pings(machine, peer)


def ipaddress_of(answer: object) -> str:
    """The host's address on the network of an answer."""
    text = str(cast("dict[str, list[str]]", answer)["addresses"][0])
    return re.sub(r"\d+/\d+$", "1", text)


def check_a_bounded_machine_is_bounded_by_its_process(peer: Peer) -> None:
    with Machine(engine="kvm", memory="256M", network="nat", bandwidth=1 << 20) as machine:
        assert networks(machine)[0]["frames"] == "vm process"
        pings(machine, peer)


@contextmanager
def without_device() -> Iterator[None]:
    away = DEVICE.with_name("vhost-net.away")
    DEVICE.rename(away)
    try:
        yield
    finally:
        away.rename(DEVICE)


@contextmanager
def switched_off() -> Iterator[None]:
    os.environ["RINGFENCE_VHOST_NET"] = "0"
    try:
        yield
    finally:
        del os.environ["RINGFENCE_VHOST_NET"]


def check_without_vhost_net_the_process_moves_them(peer: Peer) -> None:
    for how in (without_device, switched_off):
        with how(), make() as machine:
            assert networks(machine)[0]["frames"] == "vm process"
            pings(machine, peer)
            assert [card["vhost_pairs"] for card in cards(machine)] == [0]


def measure(peer: Peer) -> dict[str, float]:
    """Gbit/s out of and into a machine, with vhost-net and without."""
    found = {}
    for name, how in (("process", switched_off), ("vhost", tempfile.TemporaryDirectory)):
        with how(), make() as machine:
            found[f"{name}_out"] = transfer(machine, peer)
            found[f"{name}_in"] = transfer(machine, peer, "-R")
    return found


def main() -> int:
    """Calls each check and says how many passed; or measures, when told so."""
    with tempfile.TemporaryDirectory() as home, Peer() as peer:
        # Kernels are where they always are.
        os.environ["XDG_STATE_HOME"] = home
        if sys.argv[1:] == ["--measure"]:
            sys.stdout.write(json.dumps(measure(peer)) + "\n")
            return 0
        failed = passed = 0

        def attempt(check: Callable[[], None]) -> None:
            nonlocal failed, passed
            try:
                check()
                passed += 1
            except Exception:
                traceback.print_exc()
                failed += 1

        with make() as machine:
            for check in (
                check_the_kernel_moves_the_frames,
                check_the_host_reaches_the_machine,
                check_much_passes_both_ways,
                check_the_driver_may_start_again,
                check_the_guest_may_use_fewer_pairs,
                check_a_paused_machine_goes_on,
                check_forged_frames_are_refused_and_counted,
                check_a_capture_sees_what_passes,
                check_cards_come_and_go,
            ):
                attempt(partial(check, machine, peer))
        attempt(partial(check_a_bounded_machine_is_bounded_by_its_process, peer))
        attempt(partial(check_without_vhost_net_the_process_moves_them, peer))
        sys.stdout.write(f"{passed} passed, {failed} failed\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

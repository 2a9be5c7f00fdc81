"""Who moves a machine's frames, and who counts them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ringfence.guest.spec import InterfaceSpec
from ringfence.machine.driver import Place
from ringfence.machine.network_plan import Attachments, attach_options
from ringfence.machine.spec import MachineSpec
from ringfence.machine.vm_driver import _numbered
from ringfence.network import Attachment, links
from ringfence.network.store import Member, NetworkSpec, Store

if TYPE_CHECKING:
    from pathlib import Path

MAC = "02:00:00:00:00:01"


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attachments:
    """A machine with one card, whose link counts."""
    attachment = Attachment(interface=InterfaceSpec(mac=MAC), device={}, hosts={})
    attachment.link = "rft0"
    place = Place(machine_id="m1", name="m1", folder=tmp_path, sockets=tmp_path)
    found = Attachments(MachineSpec(), place, "vm")
    monkeypatch.setitem(found._by_name, "nat", attachment)
    counted = {"sent_frames": 3, "sent_bytes": 300, "received_frames": 5, "received_dropped": 1}
    monkeypatch.setattr(links, "statistics", lambda _: counted)
    return found


def test_the_host_counts_what_its_kernel_moves(plugged: Attachments) -> None:
    plugged.plugged([{"name": "net0", "mac": MAC, "frames": "vhost-net"}])
    devices = {"net0": {"tx_frames": 0, "rx_frames": 0, "throttled": 0}, "rng1": {"requests": 2}}
    plugged.count(devices)
    assert devices["net0"] == {
        "tx_frames": 3, "tx_bytes": 300, "rx_frames": 5, "rx_dropped": 1, "throttled": 0,
    }  # fmt: skip
    assert devices["rng1"] == {"requests": 2}
    assert plugged.describe()[0]["frames"] == "vhost-net"


def test_the_vm_process_counts_what_it_moves(plugged: Attachments) -> None:
    plugged.plugged([{"name": "net0", "mac": MAC, "frames": "vm process"}])
    devices = {"net0": {"tx_frames": 7}}
    plugged.count(devices)
    assert devices == {"net0": {"tx_frames": 7}}
    assert plugged.describe()[0]["frames"] == "vm process"


def test_the_environment_turns_vhost_net_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGFENCE_VHOST_NET", raising=False)
    assert attach_options(MachineSpec(), "m").vhost
    monkeypatch.setenv("RINGFENCE_VHOST_NET", "0")
    assert not attach_options(MachineSpec(), "m").vhost


def test_a_host_without_vhost_net_has_no_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise FileNotFoundError(2, "No such file or directory", f"{path} {flags}")

    monkeypatch.setattr(os, "open", refuse)
    assert links.open_vhost(4) == []


def test_descriptors_beside_a_request_are_named_by_their_places() -> None:
    card: dict[str, object] = {
        "type": "net", "tap_fds": [7, 9], "vhost_fds": [12, 5], "mac": MAC,
    }  # fmt: skip
    numbered = _numbered(card, [7, 9, 12, 5])
    assert numbered == {"tap_fds": [0, 1], "vhost_fds": [2, 3], "mac": MAC}
    assert _numbered({"type": "net", "link_fd": 8}, [8]) == {"link_fd": 0}


def test_who_moves_frames_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path))
    store = Store()
    store.add(NetworkSpec(name="web", mode="nat"))
    with open(store.join("web", Member(machine_id="m1", name="one", mac=MAC)), "rb"):  # noqa: PTH123
        store.note_frames("web", "m1", "vhost-net")
        store.note_frames("web", "m2", "vhost-net")
        [(member, lives)] = store.members("web")
    assert (member.frames, lives) == ("vhost-net", True)

"""Machines with several interfaces, put in and taken out while they run."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ringfence import Machine, _binaries, _paths
from ringfence.errors import ConfigError, ConflictError, NotFoundError
from ringfence.machine.attached import AttachedMachine
from ringfence.network import manage
from ringfence.network.store import NetworkSpec, Store
from tests.functional.container.test_rootless import as_user, home, interpreter, owned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ringfence.machine.spec import EngineName
    from tests.framework.networks import Peer

user_home = home

pytestmark = [pytest.mark.root, pytest.mark.netns]

_WEB = "curl --silent --show-error --max-time 10"


@pytest.fixture(params=["bt", "container"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    return name


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels stay where they are.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def _pings(machine: Machine, name: str) -> bool:
    return machine.run(["ping", "-c", "1", "-W", "2", name]).exit_code == 0


def _links(machine: Machine) -> set[str]:
    return set(machine.run(["ls", "/sys/class/net"]).stdout.split())


def test_a_machine_is_on_several_networks_from_its_start(engine: EngineName, peer: Peer) -> None:
    manage.create(NetworkSpec(name="front", mode="user", subnets=("10.95.0.0/24",)))
    manage.create(NetworkSpec(name="back", mode="isolated"))
    with (
        Machine(
            engine=engine,
            name="app",
            network=["front,ip=10.95.0.20", "back,mac=02:00:00:00:00:0b"],
        ) as app,
        Machine(engine="container", name="db", network="back") as db,
        Machine(engine="container", name="web", network="front") as web,
    ):
        assert {"lo", "eth0", "eth1"} <= _links(app)
        shown = app.run(["ip", "-o", "addr"]).stdout
        assert "10.95.0.20/24" in shown
        assert "02:00:00:00:00:0b" in app.run(["ip", "link"]).stdout
        # Names of both networks are found, and the way outside is the first's.
        assert _pings(app, "db")
        assert _pings(app, "web")
        assert _pings(db, "app")
        assert app.run([*_WEB.split(), f"http://{peer.v4}/"]).exit_code == 0
        assert not _pings(db, peer.v4)
        assert web.run(["getent", "hosts", "app"]).stdout.startswith(("10.95.0.20", "fd"))


def test_interfaces_that_come_at_once_are_used_at_once_and_names_are_found() -> None:
    others = ("isolated", "host-only", "nat")
    with Machine(engine="bt", name="one") as one, ExitStack() as stack:
        for network in others:
            machine = Machine(engine="container", name=f"in-{network}", network=network)
            stack.enter_context(machine)
        for network in others:
            one.connect(network)
        found = stack.pop_all()
        with found:
            for network in others:
                assert one.run(["getent", "hosts", f"in-{network}"]).exit_code == 0, network
                # The kernel asks again for a neighbour's address after a second.
                ping = ["ping", "-4", "-c", "1", "-W", "0.8", f"in-{network}"]
                assert one.run(ping).exit_code == 0, network


def test_interfaces_come_and_go_while_a_machine_runs(engine: EngineName, peer: Peer) -> None:
    with (
        Machine(engine=engine, name="one", network="isolated") as one,
        Machine(engine="container", name="two", network="nat") as two,
    ):
        assert not _pings(one, "two")
        before = _links(one)
        for _ in range(2):
            found = one.connect("nat")
            assert found["network"] == "nat"
            assert one.entry.record.network == "isolated, nat"
            assert _pings(one, "two")
            assert _pings(two, "one")
            assert one.run([*_WEB.split(), f"http://{peer.v4}/"]).exit_code == 0
            with pytest.raises(ConflictError, match="already"):
                one.connect("nat")
            one.disconnect("nat")
            assert _links(one) == before
            assert not _pings(one, "two")
        with AttachedMachine("one") as attached:
            addresses = attached.connect("user")["addresses"]
            assert isinstance(addresses, list)
            assert one.run([*_WEB.split(), f"http://{peer.v4}/"]).exit_code == 0
            attached.disconnect("user")
        with pytest.raises(NotFoundError, match="not on the network"):
            one.disconnect("user")
        with pytest.raises(NotFoundError, match="no network"):
            one.connect("nowhere")
        assert one.entry.record.network == "isolated"
    assert Store().names() == []


def test_a_machine_without_a_network_gets_one(engine: EngineName, peer: Peer) -> None:
    with Machine(engine=engine, network="none") as machine:
        assert _links(machine) == {"lo"}
        machine.connect("user")
        assert machine.run([*_WEB.split(), f"http://{peer.v4}/"]).exit_code == 0


def test_wrong_interfaces_are_refused() -> None:
    for networks, words in (
        (["user", "user"], "twice"),
        (["none", "user"], "without a network"),
        (["user,speed=3"], "interface"),
        ([",ip=10.0.0.1"], "names no network"),
    ):
        with pytest.raises(ConfigError, match=words):
            Machine(engine="bt", network=networks)


_ROOTLESS = """
import sys
from ringfence import Machine
engine = sys.argv[1]
with Machine(engine=engine, name="one", network="isolated") as one:
    with Machine(engine="container", name="two", network="isolated") as two:
        ping = "ping -c 1 -W 2".split()
        assert one.run([*ping, "two"]).exit_code == 0, "one to two"
        assert two.run([*ping, "one"]).exit_code == 0, "two to one"
        assert one.run([*ping, sys.argv[2]]).exit_code != 0, "isolated"
        one.connect("user")
        web = "curl --silent --max-time 10".split()
        assert one.run([*web, f"http://{sys.argv[2]}/"]).exit_code == 0, "outside"
        try:
            one.connect("nat")
        except Exception as error:
            assert "needs root" in str(error), error
        else:
            raise AssertionError("nat without root")
        one.disconnect("user")
print("fine")
"""


@pytest.fixture
def _tun_for_all() -> Iterator[None]:
    """Users may open it meanwhile, as udev has it by default."""
    tun = Path("/dev/net/tun")
    mode = tun.stat().st_mode & 0o777
    tun.chmod(0o666)
    yield
    tun.chmod(mode)


@pytest.mark.usefixtures("_tun_for_all")
def test_an_ordinary_user_connects_machines(
    engine: EngineName, peer: Peer, user_home: Path
) -> None:
    for name in ("ringfence-vm", "ringfence-gateway"):
        shutil.copy(_binaries.find(name), user_home.parent / "bin")
    cache = user_home / "ringfence" / "cache"
    shutil.copytree(_paths.cache_dir() / "kernels", cache / "kernels", symlinks=True)
    owned(user_home)
    words = [interpreter(), "-c", _ROOTLESS, engine, peer.v4]
    assert as_user(user_home, *words) == "fine\n"

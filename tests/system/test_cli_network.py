"""The command ``ringfence network``: what it refuses, and what it says then."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.system.test_cli_run import COMMAND, env, left_behind, ringfence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["env"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


_CREATE = ("create", "b", "--mode", "user")


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (
            (*_CREATE, "--subnet", "10.211.0.128/25"),
            "overlaps 10.211.0.0/24 of the network a",
            "choose",
        ),
        ((*_CREATE, "--subnet", "10.212.0.1/24"), "has host bits set", "such as"),
        ((*_CREATE, "--subnet", "10.212.0.0/31"), "8 to 29 bits", ""),
        ((*_CREATE, "--subnet", "127.1.0.0/16"), "a host's loopback", "such as"),
        ((*_CREATE, "--subnet", "fe80::/64"), "a link's own", "such as"),
        ((*_CREATE, "--subnet", "230.0.0.0/8"), "groups", "such as"),
        ((*_CREATE, "--mtu", "100"), "1280 to 65520", ""),
        ((*_CREATE, "--lease", "x"), "keeps no address", "NAME=ADDRESS"),
        ((*_CREATE, "--allow", "a b"), "not something that a rule", "CIDR"),
        ((*_CREATE, "--allow", "10.0.0.0/8:99999"), "1 to 65535", ""),
        ((*_CREATE, "--interface", "lo"), "mode bridge", "--interface"),
        (("create", "a"), "a network a already", "network rm a"),
        (("create", "nat"), "can't be called", "mode's name"),
        (("create", "b", "--mode", "wormhole"), "invalid choice", "--help"),
        (("inspect", "zzz"), "neither a network nor a machine 'zzz'", "network ls"),
        (("refusals", "zzz"), "neither a network nor a machine 'zzz'", "ps -a"),
        (("capture", "zzz"), "neither a network nor a machine 'zzz'", "network ls"),
        (("policy", "zzz"), "neither a network nor a machine 'zzz'", "network ls"),
        (("policy", "a", "--allow", "x.example", "--clear"), "cleared at once", ""),
        (("capture", "a", "-o", "/no/such/x"), "no gateway runs for a", "while machines are on it"),
        (("rm", "zzz"), "no network 'zzz'", "create zzz"),
        (("connect", "a", "zzz"), "no machine 'zzz'", "ps -a"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(
    env: dict[str, str], words: tuple[str, ...], said: str, hint: str
) -> None:
    assert ringfence(env, "network", "create", "a", "--subnet", "10.211.0.0/24").returncode == 0
    done = ringfence(env, "network", *words)
    text = done.stderr.decode()
    assert done.returncode in (2, 125), text
    assert said in text
    assert "Traceback" not in text
    if hint:
        assert hint in text.partition("hint:")[2], text
    assert ringfence(env, "network", "ls", "-q").stdout == b"a\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--network", "nat:x"), "takes nothing behind a colon"),
        (("--network", "bridge"), "needs the host's interface"),
        (("--network", "user", "--mac", "01:00:00:00:00:01"), "not the Ethernet address"),
        (("--network", "user", "--mac", "zz"), "not the Ethernet address"),
        (("--network", "user", "--ip", "10.0.2.9"), "a network of its own"),
        (("--network", "a", "--ip", "10.1.1.1"), "not an address of the network"),
        (("--network", "a", "--ip", "10.211.0.1"), "the network's own"),
        (("--network", "user", "-p", "99999:1"), "1 to 65535"),
        (("--network", "user", "-p", "x:1"), "not a port to publish"),
        (("--network", "user", "-p", "192.0.2.77:8080:1"), "this host has no address 192.0.2.77"),
        (("--network", "user", "-p", "{taken}:1"), "in use"),
        (("--network", "none", "--default", "deny"), "without a network"),
        (("--network", "user", "--dns", "x"), "not an IP address"),
        (("--network", "user", "--add-host", "x"), "NAME:IP"),
        (("--network", "user", "--bandwidth", "0"), "bytes a second"),
        (("--network", "user", "--hostname", "a b"), "not a host name"),
    ],
)
def test_a_machine_that_asks_for_what_cannot_be_is_not_started(
    env: dict[str, str], taken_port: int, words: tuple[str, ...], said: str
) -> None:
    assert ringfence(env, "network", "create", "a", "--subnet", "10.211.0.0/24").returncode == 0
    given = [word.format(taken=taken_port) for word in words]
    done = ringfence(env, "run", *given, "--", "true")
    text = done.stderr.decode()
    assert done.returncode in (2, 125), text
    assert said in text
    assert "Traceback" not in text
    assert left_behind(env) == []


def test_a_network_of_an_ordinary_user_by_all_verbs(
    env: dict[str, str], taken_port: int, tmp_path: Path
) -> None:
    def said(*words: str) -> str:
        done = ringfence(env, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    said("network", "create", "web", "--subnet", "10.211.0.0/24", "--lease", "db=10.211.0.9")
    said(
        *("run", "-d", "--name", "db", "--network", "web", "--hostname", "box"),
        *("--add-host", "x.test:192.0.2.9", "-p", "0:8000", "--", "sleep", "infinity"),
    )
    try:
        shown = said("exec", "db", "sh", "-c", "hostname; ip -o addr; getent hosts x.test db")
        assert {"box", "192.0.2.9"} <= set(shown.split())
        assert "10.211.0.9/24" in shown
        said("network", "policy", "web", "--allow", f"host:{taken_port}", "--deny", "192.0.2.0/24")
        assert "deny 192.0.2.0/24" in said("network", "policy", "web")
        with subprocess.Popen(
            [*COMMAND, "network", "capture", "web", "-o", str(tmp_path / "x.pcap")], env=env
        ) as capturing:
            # It begins once the file is there.
            deadline = time.monotonic() + 10
            while not (tmp_path / "x.pcap").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            reached = "exec 3<>/dev/tcp/{}/{}"
            host = reached.format("host.ringfence.internal", taken_port)
            assert ringfence(env, "exec", "db", "bash", "-c", host).returncode == 0
            other = reached.format("192.0.2.1", 80)
            assert ringfence(env, "exec", "db", "bash", "-c", other).returncode != 0
            capturing.send_signal(signal.SIGINT)
        assert capturing.returncode == 0
        assert (tmp_path / "x.pcap").stat().st_size > 200
        (refused,) = json.loads(said("network", "refusals", "web", "--format", "json"))["recent"]
        assert (refused["port"], refused["destination"]) == ("db", "192.0.2.1:80")
        assert "192.0.2.0/24" in refused["reason"]
        inspected = json.loads(said("network", "inspect", "web"))
        assert inspected["gateway"]["ports"][0]["counters"]["sent_frames"] > 0
        assert (
            b"machines are on the network web: db" in ringfence(env, "network", "rm", "web").stderr
        )
        said("network", "connect", "isolated", "db")
        assert "eth1" in said("exec", "db", "ip", "-o", "link")
        said("network", "disconnect", "web", "db")
        assert "eth0" not in said("exec", "db", "ip", "-o", "link")
    finally:
        ringfence(env, "rm", "-f", "db")
    assert said("network", "ls", "-q") == "web\n"
    said("network", "rm", "web")

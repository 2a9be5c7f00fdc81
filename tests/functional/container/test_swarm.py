"""Docker Swarm places a service on two daemons, each a host of its own, and each runs Ringfence."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.framework.bundles import left_behind
from tests.framework.engines import (
    answers,
    containerd_config,
    daemon,
    make_archive,
    make_runtime,
    need,
    run,
    unmount_below,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run container engines"),
]

_REPLICAS = 4
_PLACED_S = 60


class Node:
    """One daemon in a network namespace.

    Args:
        address: Its address for the others.
        client: The words that call it.
    """

    def __init__(self, address: str, client: list[str]) -> None:
        self.address = address
        self._client = client

    def __call__(self, *words: str) -> str:
        return run(*self._client, *words)

    def tasks(self) -> list[str]:
        return self("ps", "--quiet", "--filter", "label=com.docker.swarm.service.name=web").split()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect(stack: ExitStack) -> list[str]:
    """Two network namespaces with a cable between them; returns their names."""
    names = [f"rfsw{os.getpid()}-{number}" for number in (1, 2)]
    for name in names:
        ip("netns", "add", name)
        stack.callback(ip, "netns", "del", name)
    ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
    for number, name in enumerate(names, 1):
        ip("-n", name, "addr", "add", f"10.87.0.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")
    return names


def node(stack: ExitStack, place: Path, namespace: str, address: str, runtime: Path) -> Node:
    place.mkdir()
    # Not `ip netns exec`, which mounts another /sys without control groups.
    inside = ("nsenter", f"--net=/run/netns/{namespace}")
    config, socket = containerd_config(place)
    stack.enter_context(
        daemon(
            place / "containerd.log", lambda: answers("ctr", "-a", socket, "version"),
            *inside, need("containerd"), "-c", config,
        )
    )  # fmt: skip
    client = [need("docker"), "-H", f"unix://{place}/d.sock"]
    stack.enter_context(
        daemon(
            place / "dockerd.log", lambda: answers(*client, "version"),
            *inside, need("dockerd"), "--data-root", place / "root", "--exec-root", place / "run",
            "-H", f"unix://{place}/d.sock", "-p", place / "pid", "--containerd", socket,
            "--add-runtime", f"ringfence={runtime}", "--default-runtime", "ringfence",
            "--iptables=false", "--ip6tables=false", "--bridge=none",
        )
    )  # fmt: skip
    return Node(address, client)


@pytest.fixture(scope="module")
def swarm() -> Iterator[list[Node]]:
    with ExitStack() as stack:
        # Sockets below it have short paths.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rf-sw-", dir="/tmp")))
        stack.callback(unmount_below, folder)
        runtime, archive = make_runtime(folder), make_archive(folder)
        namespaces = connect(stack)
        nodes = [
            node(stack, folder / str(number), namespace, f"10.87.0.{number}", runtime)
            for number, namespace in enumerate(namespaces, 1)
        ]
        for one in nodes:
            one("import", str(archive), "box")
        first, second = nodes
        first("swarm", "init", "--advertise-addr", first.address, "--listen-addr", first.address)
        token = first("swarm", "join-token", "--quiet", "worker").strip()
        second("swarm", "join", "--token", token, "--advertise-addr", second.address,
               f"{first.address}:2377")  # fmt: skip
        yield nodes
        for one in (second, first):
            one("swarm", "leave", "--force")


def until(holds: Callable[[], bool], explain: Callable[[], str]) -> None:
    end = time.monotonic() + _PLACED_S
    while not holds():
        assert time.monotonic() < end, explain()
        time.sleep(0.3)


def test_a_service_runs_on_both_nodes_and_what_ends_is_started_again(swarm: list[Node]) -> None:
    first, second = swarm

    def explain() -> str:
        return first("service", "ps", "--no-trunc", "web")

    first(
        "service", "create", "--detach", "--name", "web", "--replicas", str(_REPLICAS),
        "--network", "host", "--no-resolve-image", "--limit-memory", "32m",
        "--restart-delay", "100ms", "box", "sleep", "1000",
    )  # fmt: skip
    until(lambda: [len(one.tasks()) for one in swarm] == [2, 2], explain)
    victim = second.tasks()[0]
    runtimes = {
        one("inspect", "--format", "{{.HostConfig.Runtime}}", task).strip()
        for one in swarm
        for task in one.tasks()
    }
    limit = first("exec", first.tasks()[0], "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    second("kill", victim)
    until(
        lambda: (
            victim not in second.tasks() and sum(len(one.tasks()) for one in swarm) == _REPLICAS
        ),
        explain,
    )
    all_tasks = [task for one in swarm for task in one.tasks()]
    first("service", "scale", "--detach", "web=1")
    until(lambda: sum(len(one.tasks()) for one in swarm) == 1, explain)
    first("service", "rm", "web")
    until(lambda: not any(one.tasks() for one in swarm), lambda: "tasks stay")

    assert runtimes == {"ringfence"}
    assert limit.strip() == str(32 << 20)
    assert [left for task in all_tasks for left in left_behind(task)] == []

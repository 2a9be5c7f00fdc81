"""The agent as an ordinary process of this host, served over UNIX sockets."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from ringfence.guest.agent import Agent
from ringfence.guest.spec import GuestSetup, RootSpec
from tests.framework.programs import built_program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.guest.spec import ExecSpec


@dataclass(frozen=True)
class Hosted:
    """A running agent.

    Args:
        agent: Its client.
        path: Where it listens.
        process: The agent itself.
    """

    agent: Agent
    path: Path
    process: subprocess.Popen[bytes]

    def connect(self) -> socket.socket:
        """A connection as the host makes it."""
        return connect(self.path)

    def run(self, spec: ExecSpec, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """A command's exit code and output."""
        with self.agent.exec(spec) as process:
            output, errors = process.communicate(stdin, timeout_s=60)
            return process.wait(), output, errors


def connect(path: Path) -> socket.socket:
    """A connection to a UNIX socket."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


@pytest.fixture(scope="session")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """An agent that has said hello and been set up."""
    program = built_program("ringfence-agent", "ringfence-agent")
    folder = tmp_path_factory.mktemp("agent")
    listen, control = folder / "agent", folder / "host"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(control))
        listener.listen()
        argv = [str(program), "--listen", f"unix:{listen}", "--connect", f"unix:{control}"]
        process = stack.enter_context(subprocess.Popen(argv))
        stack.callback(process.terminate)
        listener.settimeout(30)
        connection, _ = listener.accept()
        # What the VM process does with a guest's connection.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, connection:
            ports = (1024).to_bytes(4, "little") + (5000).to_bytes(4, "little")
            socket.send_fds(theirs, [ports], [connection.fileno()])
            agent = Agent.accept(ours, functools.partial(connect, listen), timeout_s=30)
        stack.enter_context(agent)
        agent.setup(GuestSetup(root=RootSpec.virtiofs("root"), limits={"nofile": (500, 600)}))
        yield Hosted(agent, listen, process)

"""The setup of a machine that is a container, under way: its start, and what it asks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ringfence.container.launch import Launch
from ringfence.machine import sockets

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from ringfence.container.identity import Maps
    from ringfence.machine.driver import Place
    from ringfence.machine.network_plan import Attachments
    from ringfence.machine.phases import Phases

__all__ = ["Setup", "spawn"]


def spawn(place: Place, path: Path, inherit: list[int], early: int, stack: ExitStack) -> Launch:
    """Starts the setup program with what the agent will have: its socket, its life and its log."""
    listener = sockets.listen(path)
    stack.callback(path.unlink, missing_ok=True)
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    # Its write end is this process's life: the container ends when it is closed.
    stack.callback(os.close, theirs)
    log = os.open(place.folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        launch = Launch(inherit, (listener.fileno(), ours, log), early)
    finally:
        os.close(ours)
        os.close(log)
        listener.close()
    stack.callback(launch.close)
    return launch


class Setup:
    """A container's setup under way.

    Args:
        launch: Its process, which has its plan.
        maps: Users in its user namespace, if it has one.
        attachments: Its networks.
        phases: Is told how long it takes.
    """

    def __init__(
        self, launch: Launch, maps: Maps | None, attachments: Attachments, phases: Phases
    ) -> None:
        self.launch = launch
        self._maps = maps
        self._attachments = attachments
        self._phases = phases

    def follow(self, *, until: str = "") -> None:
        """Answers until its first process has a number, or is the agent.

        Raises:
            HostError: A step failed; the process is gone.
        """
        with self._phases.measure("setup"):
            answers = {"map": self._write_maps, "register": self._enter_networks}
            self.launch.follow(answers, until=until)

    def _write_maps(self) -> str:
        if self._maps is not None:
            self._maps.write(self.launch.stage)
        return ""

    def _enter_networks(self) -> str:
        for attachment in self._attachments:
            attachment.enter(self.launch.pid)
        return ""

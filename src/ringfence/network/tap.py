"""TAP devices in a container's network namespace, made by a short program that enters it.

Source: Linux ``Documentation/networking/tuntap.rst``, ``setns(2)``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ringfence.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ringfence.guest.spec import InterfaceSpec

__all__ = ["in_namespace", "set_up"]

_HELPER = Path(__file__).with_name("_tap_helper.py")
_TIMEOUT_S = 30.0


@contextmanager
def in_namespace(pid: int, device: str, interface: InterfaceSpec) -> Iterator[BinaryIO]:
    """A TAP device in the network namespace of ``pid``, with addresses and routes, up.

    Args:
        pid: A process in the namespaces.
        device: The interface's name there.
        interface: What it is set up with.

    Yields:
        The device's descriptor; closed afterwards.

    Raises:
        HostError: The host refuses.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _help(pid, device, interface, theirs.fileno())
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    with os.fdopen(fds[0], "r+b", buffering=0) as file:
        yield file


def set_up(pid: int, device: str, interface: InterfaceSpec) -> None:
    """Gives a device that is in the network namespace of ``pid`` its addresses and routes.

    Raises:
        HostError: The host refuses.
    """
    _help(pid, device, interface, None)


def _help(pid: int, device: str, interface: InterfaceSpec, channel: int | None) -> None:
    request = {
        "pid": pid,
        "device": device,
        "mac": interface.mac,
        "addresses": list(interface.addresses),
        "gateways": list(interface.gateways),
        "mtu": interface.mtu or 1500,
        "channel": channel,
    }
    done = subprocess.run(
        [sys.executable, "-IS", str(_HELPER), json.dumps(request)],
        pass_fds=[] if channel is None else [channel],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        message = f"cannot set up the container's network: {words[-1] if words else 'no word'}"
        hint = "a rootless container needs access to /dev/net/tun: chmod 666 /dev/net/tun"
        raise HostError(message, hint=hint if "tun" in message else "")

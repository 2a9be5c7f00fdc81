"""What passes a link of the host, as pcap.

Source: ``packet(7)``; the libpcap file format (``pcap-savefile(5)``).
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from ringfence.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

__all__ = ["capture"]

_ETH_ALL = 3
# Segments that are yet to be split are longer than any frame.
_LONGEST = 1 << 18
_ETHERNET = 1
_BUFFER = 8 << 20


def capture(link: str, file: BinaryIO, stopped: Callable[[], bool]) -> int:
    """Writes frames that pass a link until told to stop; returns how many.

    Args:
        link: The host's link.
        file: Gets the capture.
        stopped: Asked a few times a second.

    Raises:
        HostError: The host refuses.
    """
    try:
        heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_ALL))
    except OSError as error:
        message = f"cannot look at {link}: {error.strerror}"
        raise HostError(message, hint="run it with sudo", errno=error.errno) from error
    with heard:
        heard.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        try:
            heard.bind((link, _ETH_ALL))
        except OSError as error:
            message = f"cannot look at {link}: {error.strerror}"
            raise HostError(message, errno=error.errno) from error
        heard.settimeout(0.0)
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LONGEST, _ETHERNET))
        file.flush()
        return _copy(heard, file, stopped)


def _copy(heard: socket.socket, file: BinaryIO, stopped: Callable[[], bool]) -> int:
    count = 0
    while not stopped():
        select.select([heard], [], [], 0.2)
        while not stopped():
            try:
                frame, _ = heard.recvfrom(_LONGEST)
            except BlockingIOError:
                break
            except OSError:
                # The link is gone.
                return count
            now_us = time.time_ns() // 1000
            size = len(frame)
            head = struct.pack("<IIII", now_us // 1_000_000, now_us % 1_000_000, size, size)
            file.write(head + frame)
            count += 1
        file.flush()
    return count

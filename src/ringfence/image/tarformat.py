"""What a tar archive is made of: members, and the values in their headers.

Source: POSIX.1-2017 pax, "ustar Interchange Format"; the GNU tar manual, appendix D.
"""

from __future__ import annotations

from typing import NoReturn

from ringfence.errors import FormatError

__all__ = ["BLOCK", "Entry", "Kind", "fail", "number", "records", "time_ns"]

BLOCK = 512


class Kind:
    """What a member is: the header's type flag."""

    FILE = b"0"
    HARD_LINK = b"1"
    SYMLINK = b"2"
    CHAR = b"3"
    BLOCK = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"

    ALL = frozenset({FILE, HARD_LINK, SYMLINK, CHAR, BLOCK, DIRECTORY, FIFO})


class Entry:
    """One member. `sparse` lists (offset, length) of the data; `size` is the apparent length."""

    __slots__ = (
        "device", "gid", "kind", "link", "mode", "mtime_ns", "name", "size", "sparse", "stored",
        "uid", "xattrs",
    )  # fmt: skip

    def __init__(self, name: bytes, kind: bytes) -> None:
        self.name = name
        self.kind = kind
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.size = 0
        self.stored = 0
        self.mtime_ns = 0
        self.link = b""
        self.device = (0, 0)
        self.xattrs: dict[bytes, bytes] | None = None
        self.sparse: list[tuple[int, int]] | None = None


def fail(why: str) -> NoReturn:
    """Refuse the archive."""
    msg = f"not a valid tar archive: {why}"
    raise FormatError(msg)


def number(field: bytes) -> int:
    """An octal number, or GNU's base 256 when the first bit is set."""
    if field[:1] >= b"\x80":
        value = int.from_bytes(field, "big", signed=False)
        value &= (1 << (8 * len(field) - 1)) - 1
        if field[0] == 0xFF:  # negative: two's complement
            value -= 1 << (8 * len(field) - 1)
        return value
    try:
        return int(field.rstrip(b" \0") or b"0", 8)
    except ValueError:
        text = field.split(b"\0", 1)[0].strip()
        try:
            return int(text or b"0", 8)
        except ValueError:
            fail(f"{field!r} is not a number")


def records(data: bytes) -> dict[bytes, bytes]:
    r"""The records of a pax header: length, space, ``KEY=VALUE``, line feed."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        if space < 0 or not data[at:space].isdigit():
            if not data[at:].strip(b"\0"):
                break
            fail("an extended header is malformed")
        stop = at + int(data[at:space])
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if stop > len(data) or not equals or data[stop - 1 : stop] != b"\n":
            fail("an extended header is malformed")
        found[key] = value
        at = stop
    return found


def time_ns(value: bytes) -> int:
    """Decimal seconds as nanoseconds, exactly."""
    whole, _, fraction = value.lstrip(b"-").partition(b".")
    if not whole.isdigit() or (fraction and not fraction.isdigit()) or len(whole) > 12:
        fail(f"{value!r} is not a time")
    total = int(whole) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0") or b"0")
    return -total if value.startswith(b"-") else total

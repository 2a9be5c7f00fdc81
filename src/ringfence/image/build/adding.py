"""ADD's own ways: files from the network, archives that are unpacked.

Source: Docker's Dockerfile reference, ADD.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ringfence.errors import ConfigError, FormatError, HostError, UnsupportedError
from ringfence.image.compression import Decompressed
from ringfence.image.limits import Limits
from ringfence.image.references import Digest
from ringfence.image.tar import TarReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.image.build.copying import Copied, Placing
    from ringfence.image.build.view import View
    from ringfence.image.store import Store
    from ringfence.image.tarwrite import TarWriter

__all__ = ["download", "is_address", "split_archives", "write_archive"]

_MAX_DOWNLOAD = 4 << 30


def is_address(text: str) -> bool:
    """Whether ADD fetches it."""
    return text.startswith(("http://", "https://", "git@", "git://", "ssh://"))


def download(url: str, checksum: str) -> tuple[str, bytes]:
    """Fetch a file.

    Args:
        url: Where from; unencrypted where it says so.
        checksum: Its digest; empty when it isn't known.

    Returns:
        Its name and contents.

    Raises:
        UnsupportedError: It is a repository.
        HostError: It can't be fetched.
        FormatError: Its digest is another.
    """
    from ringfence.image.http import HttpClient  # noqa: PLC0415 - few builds need it

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.path.endswith(".git"):
        msg = f"ADD can't fetch the repository {url}"
        raise UnsupportedError(msg, hint="clone it into the context, or RUN git clone")
    name = unquote(parts.path.rpartition("/")[2])
    if not name:
        msg = f"ADD can't tell a file's name from {url}"
        raise ConfigError(msg)
    client = HttpClient(frozenset({parts.netloc} if parts.scheme == "http" else ()))
    try:
        with client.request("GET", url) as response:
            if response.status != 200:
                msg = f"{url} can't be fetched: status {response.status}"
                raise HostError(msg)
            pieces: list[bytes] = []
            size = 0
            while piece := response.read(1 << 20):
                pieces.append(piece)
                size += len(piece)
                if size > _MAX_DOWNLOAD:
                    msg = f"{url} is longer than {_MAX_DOWNLOAD} bytes"
                    raise FormatError(msg)
    finally:
        client.close()
    data = b"".join(pieces)
    if checksum:
        wanted = Digest.parse(checksum)
        if Digest.of(data, wanted.algorithm) != wanted:
            msg = f"{url} has the digest {Digest.of(data, wanted.algorithm)}, not {wanted}"
            raise FormatError(msg)
    return name, data


def split_archives(files: Sequence[Copied]) -> tuple[list[Copied], list[Copied]]:
    """What is copied as it is, and the tar archives, compressed in any way."""
    plain: list[Copied] = []
    archives: list[Copied] = []
    for item in files:
        node = item.node
        known = node is not None and stat.S_ISREG(node.mode) and _is_tar(Path(node.source))
        (archives if known else plain).append(item)
    return plain, archives


def _is_tar(path: Path) -> bool:
    try:
        with path.open("rb", buffering=0) as file, Decompressed(file, Limits()) as pieces:
            start = b""
            for piece in pieces:
                start += piece
                if len(start) >= 512:
                    break
            return start[257:262] == b"ustar"
    except (OSError, FormatError, UnsupportedError):
        return False


def write_archive(
    store: Store,
    item: Copied,
    target: str,
    writer: TarWriter,
    view: View,
    placing: Placing,
) -> None:
    """Write an archive's members below a directory.

    Raises:
        FormatError: It isn't an archive, or tries to get out.
    """
    if item.node is None:
        return
    base = view.resolve(target)[0]
    with (
        Path(item.node.source).open("rb", buffering=0) as file,
        Decompressed(file, store.limits) as pieces,
    ):
        reader = TarReader(pieces, store.limits)
        for entry in reader:
            parts = [part for part in entry.name.split(b"/") if part not in (b"", b".")]
            if b".." in parts:
                msg = f"the archive tries to get out: {os.fsdecode(entry.name)!r}"
                raise FormatError(msg)
            if not parts:
                continue
            folder = os.fsdecode(b"/" + b"/".join((*base, *parts[:-1])))
            entry.name = b"/".join((*view.resolve(folder)[0], parts[-1]))
            if entry.kind == b"1":
                entry.link = b"/".join((*base, *entry.link.strip(b"/").split(b"/")))
            if placing.owner is not None:
                entry.uid, entry.gid = placing.owner
            if placing.latest_ns is not None:
                entry.mtime_ns = min(entry.mtime_ns, placing.latest_ns)
            if entry.sparse is not None:
                msg = "the archive has sparse files"
                raise UnsupportedError(msg, hint="pack it without --sparse")
            writer.add(entry, reader.data())

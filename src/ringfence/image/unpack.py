"""One layer's tar as a lower directory of an overlay.

Whiteouts become what the kernel's overlay understands: a character device 0:0, and the attribute
``overlay.opaque`` (``user.`` always, ``trusted.`` too where allowed). Names are resolved
component by component below the layer's own root and symbolic links never lead out of it: a
hostile archive can write in its own directory only.

Source: OCI image specification 1.1, layer.md; Linux Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from typing import TYPE_CHECKING

from ringfence.errors import FormatError, HostError
from ringfence.image.ownership import OVERRIDE, Ownership, note_owner
from ringfence.image.tar import TarReader
from ringfence.image.tarformat import Entry, Kind
from ringfence.image.treefd import Tree, find_lower, remove_tree, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from ringfence.image.limits import Limits

__all__ = ["Unpacked", "unpack_layer"]

_log = logging.getLogger(__name__)

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Unpacked:
    """What came of a layer: counts, and whether it leans on the layers below it."""

    __slots__ = ("bytes", "entries", "needs_lower", "skipped")

    def __init__(self) -> None:
        self.entries = 0
        self.bytes = 0
        self.skipped = 0
        self.needs_lower = False


class _Directory:
    """A directory's attributes, set when all is unpacked."""

    __slots__ = ("entry", "implied")

    def __init__(self, entry: Entry, *, implied: bool) -> None:
        self.entry = entry
        self.implied = implied


def unpack_layer(
    pieces: Iterable[bytes],
    root: Path,
    *,
    ownership: Ownership,
    limits: Limits,
    lowers: Sequence[Path] = (),
) -> Unpacked:
    """Unpack a layer.

    Args:
        pieces: The uncompressed tar.
        root: An empty directory that nobody else writes to.
        ownership: What becomes of files' owners.
        limits: What it may cost.
        lowers: The layers below, lowest first: directories that this one leaves out take their
            attributes from them, and hard links may lead to their files.

    Raises:
        FormatError: Malformed, or it tries to get out, or costs too much.
        HostError: The disk is full or the file system lacks something.
    """
    unpacker = _Unpacker(root, ownership, limits, lowers)
    try:
        unpacker.run(TarReader(pieces, limits))
    except OSError as error:
        if isinstance(error, HostError):
            raise
        msg = f"cannot unpack to {root}: {error.strerror} ({shown(unpacker.now)})"
        raise HostError(msg, errno=error.errno, path=str(root)) from error
    finally:
        unpacker.close()
    return unpacker.done


class _Unpacker:
    def __init__(
        self,
        root: Path,
        ownership: Ownership,
        limits: Limits,
        lowers: Sequence[Path],
    ) -> None:
        self.done = Unpacked()
        self.now = b""
        self._tree = Tree(root, limits.depth, self._imply, self._opaque)
        self._keep = ownership is Ownership.KEEP
        self._limits = limits
        self._lowers = lowers
        self._me = (os.geteuid(), os.getegid())
        self._directories: dict[bytes, _Directory] = {}

    def close(self) -> None:
        self._tree.close()

    def run(self, reader: TarReader) -> None:
        make = {
            Kind.DIRECTORY: self._directory,
            Kind.SYMLINK: self._symlink,
            Kind.HARD_LINK: self._hard_link,
            Kind.CHAR: self._node,
            Kind.BLOCK: self._node,
            Kind.FIFO: self._node,
        }
        done, limits = self.done, self._limits
        for entry in reader:
            done.entries += 1
            done.bytes += entry.size
            if done.entries > limits.entries or done.bytes > limits.layer_bytes:
                msg = f"the layer has more than {limits.entries} entries or its files are larger"
                msg += f" than {limits.layer_bytes} bytes"
                raise FormatError(msg, hint="raise the Limits if the image is to be trusted")
            self.now = entry.name
            folder, base = self._tree.split(entry.name)
            if not base:
                if entry.kind == Kind.DIRECTORY:
                    self._directories[b""] = _Directory(entry, implied=False)
                continue
            if base.startswith(_WHITEOUT):
                self._whiteout(folder, base)
            elif entry.kind == Kind.FILE:
                self._file(folder, base, entry, reader)
            else:
                make[entry.kind](folder, base, entry)
        self._finish()

    def _imply(self, path: bytes) -> None:
        """Note a directory that the layer itself doesn't list."""
        entry = Entry(path, Kind.DIRECTORY)
        entry.mode = 0o755
        self._directories[path] = _Directory(entry, implied=True)
        self.done.needs_lower = True

    # -- members --------------------------------------------------------------------------------

    def _clear(self, folder: bytes, base: bytes) -> None:
        """Remove what stands in the way of a new member."""
        above = self._tree.parent(folder)
        status = os.stat(base, dir_fd=above, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            path = folder + b"/" + base if folder else base
            self._tree.forget()
            for known in [k for k in self._directories if k == path or k.startswith(path + b"/")]:
                del self._directories[known]
            remove_tree(base, self._tree.parent(folder))
        else:
            os.unlink(base, dir_fd=above)

    def _file(self, folder: bytes, base: bytes, entry: Entry, reader: TarReader) -> None:
        above = self._tree.fds.get(folder) or self._tree.parent(folder)
        try:
            fd = os.open(base, _CREATE, 0o600, dir_fd=above)
        except FileExistsError:
            self._clear(folder, base)
            fd = os.open(base, _CREATE, 0o600, dir_fd=self._tree.parent(folder))
        try:
            if entry.sparse is not None:
                os.ftruncate(fd, entry.size)
                reader.write_sparse(fd, entry)
            elif entry.size:
                reader.write_to(fd)
            if self._keep:
                if entry.uid != self._me[0] or entry.gid != self._me[1]:
                    os.fchown(fd, entry.uid, entry.gid)
                os.fchmod(fd, entry.mode)
            else:
                note_owner(fd, entry)
                # Readable by us whatever the image says; set-user-ID bits would be ours to give.
                os.fchmod(fd, (entry.mode & 0o777) | 0o400)
            if entry.xattrs:
                self._attributes(fd, entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _directory(self, folder: bytes, base: bytes, entry: Entry) -> None:
        above = self._tree.parent(folder)
        path = folder + b"/" + base if folder else base
        try:
            os.mkdir(base, 0o700, dir_fd=above)
        except FileExistsError:
            status = os.stat(base, dir_fd=above, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                removed_below = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
                self._clear(folder, base)
                os.mkdir(base, 0o700, dir_fd=above)
                if removed_below:
                    self._opaque(self._tree.parent(path))
        self._directories[path] = _Directory(entry, implied=False)

    def _symlink(self, folder: bytes, base: bytes, entry: Entry) -> None:
        self._replace(
            folder,
            base,
            lambda fd: os.symlink(entry.link, base, dir_fd=fd),
        )
        self._set(self._tree.parent(folder), base, entry)

    def _hard_link(self, folder: bytes, base: bytes, entry: Entry) -> None:
        source_folder, source = self._tree.split(entry.link)
        if not source:
            msg = f"the layer links {shown(entry.name)} to nothing"
            raise FormatError(msg)
        if (source_folder, source) == (folder, base):
            return
        try:
            below = os.dup(self._tree.parent(source_folder, make=False))
        except FileNotFoundError:
            self._link_to_lower(folder, base, entry)
            return
        try:
            status = os.stat(source, dir_fd=below, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                msg = f"the layer links {shown(entry.name)} to a directory"
                raise FormatError(msg)
            self._replace(
                folder,
                base,
                lambda fd: os.link(
                    source,
                    base,
                    src_dir_fd=below,
                    dst_dir_fd=fd,
                    follow_symlinks=False,
                ),
            )
        except FileNotFoundError:
            self._link_to_lower(folder, base, entry)
        finally:
            os.close(below)

    def _link_to_lower(self, folder: bytes, base: bytes, entry: Entry) -> None:
        """A hard link to a file of a layer below: a copy, as an overlay would make."""
        self.done.needs_lower = True
        found = find_lower(self._lowers, entry.link)
        if found is None or not stat.S_ISREG(found.stat(follow_symlinks=False).st_mode):
            msg = f"the layer links {shown(entry.name)} to {shown(entry.link)}, which is missing"
            raise FormatError(msg)
        status = found.stat(follow_symlinks=False)
        copy = Entry(entry.name, Kind.FILE)
        copy.mode, copy.uid, copy.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        copy.mtime_ns = status.st_mtime_ns
        copy.xattrs = {os.fsencode(n): os.getxattr(found, n) for n in os.listxattr(found)}
        data = found.read_bytes()
        copy.size = copy.stored = len(data)
        reader = TarReader([data], self._limits)
        reader._left = len(data)  # noqa: SLF001 - it reads this one file's data
        self._file(folder, base, copy, reader)

    def _node(self, folder: bytes, base: bytes, entry: Entry) -> None:
        kinds = {Kind.CHAR: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}
        device = 0 if entry.kind == Kind.FIFO else os.makedev(*entry.device)
        if entry.kind == Kind.CHAR and not device:
            msg = f"the layer has a whiteout as a device node: {shown(entry.name)}"
            raise FormatError(msg)
        try:
            self._replace(
                folder,
                base,
                lambda fd: os.mknod(base, kinds[entry.kind] | 0o600, device, dir_fd=fd),
            )
        except PermissionError:
            # Device nodes need root of the host; a machine has its own /dev anyway.
            self.done.skipped += 1
            _log.debug("device node %s left out", shown(entry.name))
            return
        self._set(self._tree.parent(folder), base, entry)

    def _replace(self, folder: bytes, base: bytes, make: Callable[[int], None]) -> None:
        try:
            make(self._tree.parent(folder))
        except FileExistsError:
            self._clear(folder, base)
            make(self._tree.parent(folder))

    def _whiteout(self, folder: bytes, base: bytes) -> None:
        if base == _OPAQUE:
            self._opaque(self._tree.parent(folder))
            return
        name = base[len(_WHITEOUT) :]
        if name.startswith(_WHITEOUT):
            return  # aufs's own files
        if name in (b"", b".", b".."):
            msg = f"the layer has a whiteout of nothing: {shown(base)}"
            raise FormatError(msg)
        above = self._tree.parent(folder)
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=above)
        except FileExistsError:
            # It hides what is below only; this layer's own stays.
            status = os.stat(name, dir_fd=above, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self._opaque(self._tree.parent(folder + b"/" + name if folder else name))

    def _opaque(self, fd: int) -> None:
        path = f"/proc/self/fd/{fd}"
        os.setxattr(path, "user.overlay.opaque", b"y")
        if self._keep:
            # Root of a user namespace may not; its overlays use the other.
            with contextlib.suppress(PermissionError):
                os.setxattr(path, "trusted.overlay.opaque", b"y")

    # -- attributes -----------------------------------------------------------------------------

    def _set(self, above: int, base: bytes, entry: Entry) -> None:
        """Owner, mode and time of what isn't a regular file or directory."""
        if self._keep and (entry.uid, entry.gid) != self._me:
            os.chown(base, entry.uid, entry.gid, dir_fd=above, follow_symlinks=False)
        if entry.kind != Kind.SYMLINK:
            os.chmod(base, entry.mode, dir_fd=above)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(base, ns=times, dir_fd=above, follow_symlinks=False)

    def _attributes(self, fd: int, entry: Entry) -> None:
        for name, value in (entry.xattrs or {}).items():
            if name.startswith((b"trusted.", b"user.overlay.")) or name == OVERRIDE:
                continue  # they would steer the overlay (redirects, metacopy)
            if not self._keep and not name.startswith(b"user."):
                continue
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EINVAL):
                    raise
                _log.debug("attribute %s of %s left out", name, shown(entry.name))

    def _finish(self) -> None:
        """Directories' attributes, the deepest first, for their times to stay."""
        self._tree.forget()
        for path in sorted(self._directories, key=lambda p: -p.count(b"/")):
            if path:
                self._finish_directory(path, self._directories[path])
        if b"" in self._directories:
            self._finish_directory(b"", self._directories[b""])

    def _finish_directory(self, path: bytes, found: _Directory) -> None:
        entry = found.entry
        if found.implied:
            self._inherit(path, entry)
        above, _, base = path.rpartition(b"/")
        try:
            fd = os.open(
                base or b".",
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=self._tree.parent(above, make=False),
            )
        except FileNotFoundError:
            return
        try:
            if self._keep:
                if (entry.uid, entry.gid) != self._me:
                    os.fchown(fd, entry.uid, entry.gid)
                os.fchmod(fd, entry.mode)
            else:
                note_owner(fd, entry)
                os.fchmod(fd, (entry.mode & 0o777) | 0o700)
            if entry.xattrs:
                self._attributes(fd, entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _inherit(self, path: bytes, entry: Entry) -> None:
        found = find_lower(self._lowers, path)
        if found is not None and found.is_dir():
            status = found.stat(follow_symlinks=False)
            entry.mode = stat.S_IMODE(status.st_mode)
            entry.uid, entry.gid = status.st_uid, status.st_gid
            entry.mtime_ns = status.st_mtime_ns

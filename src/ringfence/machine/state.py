"""What is known of machines between processes: one directory a machine, healed when it is read.

A machine's directory holds ``machine.json`` and its logs. The process that holds the machine has
``lock`` locked for as long as it lives, so a machine whose holder died, however it died, is seen
as ended by whoever looks next, without guessing from process IDs.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ringfence import _paths
from ringfence.errors import ConfigError, ConflictError, HostError, NotFoundError, UnsupportedError
from ringfence.machine import names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Entry", "Record", "Status", "create", "find", "list_machines"]

Status = Literal["starting", "running", "paused", "exited"]

_RECORD = "machine.json"
_LOCK = "lock"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is written of a machine.

    Args:
        id: Its ID.
        name: Its name.
        status: Its state, as its holder saw it last.
        engine: What runs it.
        command: What it was started to run.
        created_s: Since the epoch.
        root: Its root file system, in words.
        vcpus: Virtual processors.
        memory_mib: RAM.
        network: How it is connected.
        pid: The process that holds it.
        vm_pid: The process that it runs in.
        kernel: Its kernel's version.
        exit_code: How its command ended.
        error: Why it failed, if it did.
        remove: Forget it when it ends.
        user: Who runs commands.
        workdir: Where commands run.
        env: The environment of commands.
    """

    id: str
    name: str
    status: Status = "starting"
    engine: str = ""
    command: tuple[str, ...] = ()
    created_s: float = 0.0
    root: str = "host"
    vcpus: int = 1
    memory_mib: int = 0
    network: str = "none"
    pid: int = 0
    vm_pid: int = 0
    kernel: str = ""
    exit_code: int | None = None
    error: str = ""
    remove: bool = False
    user: str = ""
    workdir: str = ""
    env: tuple[tuple[str, str], ...] = ()


class Entry:
    """A machine's directory.

    Args:
        path: The directory.
        record: What is written in it.
    """

    def __init__(self, path: Path, record: Record) -> None:
        self.path = path
        self.record = record
        self._lock: int | None = None

    @property
    def log(self) -> Path:
        """What its main command wrote, when it is detached."""
        return self.path / "log"

    @property
    def vm_log(self) -> Path:
        """What the VM process wrote on standard error."""
        return self.path / "vm.log"

    @property
    def console(self) -> Path:
        """What the guest's kernel wrote on its serial port."""
        return self.path / "console.log"

    @property
    def sockets(self) -> Path:
        """The directory of its sockets, while it runs."""
        return _paths.runtime_dir() / self.record.id

    def update(self, **changes: object) -> None:
        """Changes the record and writes it whole.

        Raises:
            HostError: It can't be written.
        """
        self.record = dataclasses.replace(self.record, **changes)  # type: ignore[arg-type]
        fields = {name: getattr(self.record, name) for name in Record.__slots__}
        text = json.dumps({"version": _VERSION, **fields})
        fresh = self.path / f".{_RECORD}.{os.getpid()}"
        try:
            fresh.write_text(text + "\n")
            fresh.rename(self.path / _RECORD)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            message = f"cannot write the machine's record in {self.path}: {error.strerror}"
            raise HostError(message, errno=error.errno, path=str(self.path)) from error

    def hold(self) -> None:
        """Says that this process holds the machine, until it ends or releases it."""
        fd = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock = fd

    def release(self) -> None:
        """Holds it no longer."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_held(self) -> bool:
        """Whether some process holds it."""
        if self._lock is not None:
            return True
        try:
            fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            # Its maker takes the lock before it writes the record.
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def remove(self) -> None:
        """Forgets the machine: its record, logs and sockets."""
        shutil.rmtree(self.sockets, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


def _machines_dir() -> Path:
    return _paths.state_dir() / "machines"


def create(record: Record) -> Entry:
    """Makes a machine's directory, held by this process.

    A record without a name gets one that is free.

    Raises:
        ConflictError: The name is taken.
        HostError: The directory can't be made.
    """
    folder = _machines_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _names_lock(folder):
            taken = {entry.record.name for entry in list_machines()}
            record = _named(record, taken)
            path = folder / record.id
            path.mkdir(mode=0o700)
            entry = Entry(path, record)
            try:
                entry.hold()
                entry.update(pid=os.getpid(), created_s=time.time())
            except BaseException:
                entry.remove()
                raise
    except OSError as error:
        if isinstance(error, HostError):
            raise
        message = f"cannot keep a record of the machine in {folder}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=str(folder)) from error
    return entry


def _named(record: Record, taken: set[str]) -> Record:
    if record.name:
        if record.name in taken:
            message = f"there is a machine named {record.name!r} already"
            hint = f"choose another name, or remove it: ringfence rm -f {record.name}"
            raise ConflictError(message, hint=hint)
        return record
    name = names.new_name()
    while name in taken:
        name = f"{names.new_name()}-{record.id[:4]}"
    return dataclasses.replace(record, name=name)


class _names_lock:  # noqa: N801 - reads as the function that it is
    """Held while a name is looked for and taken."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".names"
        self._fd = -1

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _read(path: Path) -> Entry | None:
    try:
        written = json.loads((path / _RECORD).read_text())
        known = {field.name for field in dataclasses.fields(Record)}
        values = {key: value for key, value in written.items() if key in known}
        values["command"] = tuple(values.get("command", ()))
        values["env"] = tuple((str(key), str(value)) for key, value in values.get("env", ()))
        return Entry(path, Record(**values))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _entries() -> Iterator[Entry]:
    try:
        folders = sorted(_machines_dir().iterdir())
    except FileNotFoundError:
        return
    for path in folders:
        if path.name.startswith("."):
            continue
        entry = _read(path)
        if entry is None:
            _drop_half_made(path)
        else:
            yield entry


def _drop_half_made(path: Path) -> None:
    """A directory without a record: its maker died, or the disk was full."""
    with suppress(OSError):
        held = Entry(path, Record(id=path.name, name="")).is_held()
        # A maker takes the lock right after the directory.
        young = time.time() - path.stat().st_mtime < 5.0
        if not held and not young:
            shutil.rmtree(path, ignore_errors=True)


def _cleared(entry: Entry) -> bool:
    """Takes from the host what a dead holder's machine has left; False: the next who looks must."""
    # Engines come late here: most who look have no dead machines to clear.
    from ringfence.machine import driver, engines  # noqa: PLC0415

    try:
        engines.load_driver(entry.record.engine).clear(driver.Place.of(entry))
    except HostError:
        return False
    except (ConfigError, UnsupportedError):
        # An engine that this installation doesn't have.
        return True
    return True


def list_machines() -> list[Entry]:
    """All machines, oldest first; those whose holder is gone are healed on the way."""
    found = []
    for entry in _entries():
        if entry.record.status != "exited" and not entry.is_held():
            if not _cleared(entry):
                continue
            shutil.rmtree(entry.sockets, ignore_errors=True)
            if entry.record.remove:
                entry.remove()
                continue
            with suppress(HostError):
                entry.update(status="exited", error="the process that held the machine ended")
        found.append(entry)
    return sorted(found, key=lambda entry: entry.record.created_s)


def find(name: str) -> Entry:
    """The machine of this name, or whose ID begins so.

    Raises:
        NotFoundError: There is none, or more than one ID begins so.
    """
    machines = list_machines()
    for entry in machines:
        if name in (entry.record.name, entry.record.id):
            return entry
    begins = [entry for entry in machines if name and entry.record.id.startswith(name)]
    if len(begins) == 1:
        return begins[0]
    if begins:
        message = f"more than one machine's ID begins with {name!r}"
        raise NotFoundError(message, hint="give more digits, or the name")
    message = f"there is no machine {name!r}"
    raise NotFoundError(message, hint="ringfence ps -a lists them")

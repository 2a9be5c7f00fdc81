"""What is known of a container between two commands of the runtime.

A directory for each container: ``state.json``, a copy of the configuration, the FIFO on which a
created container waits. Everything that can change by itself is asked of the kernel.
"""

from __future__ import annotations

import os

from ringfence.container import lean_json
from ringfence.container.cgroups.group import Group
from ringfence.container.fields import Fields
from ringfence.errors import ConfigError, ConflictError, NotFoundError

__all__ = ["State", "check_id", "default_root", "process_start"]

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
_LONGEST_ID = 1024


def default_root() -> str:
    """Where states are kept: as root in ``/run``, else with the user's runtime files."""
    if os.geteuid() == 0:
        return "/run/ringfence-oci"
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{base}/ringfence-oci" if base else f"/tmp/ringfence-oci-{os.geteuid()}"  # noqa: S108


def check_id(name: str) -> str:
    """A container's ID, if it is one: it becomes a file's name.

    Raises:
        ConfigError: It isn't.
    """
    if not name or len(name) > _LONGEST_ID or not _LETTERS.issuperset(name) or name in {".", ".."}:
        message = f"invalid container ID {name!r:.80}: letters, digits, _, +, - and . are allowed"
        raise ConfigError(message)
    return name


def process_start(pid: int) -> tuple[str, int]:
    """A process's state letter and its start, in clock ticks since the host's; ("", 0) if gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


class State:
    """One container's record.

    Args:
        root: The directory of all records.
        name: The container's ID.
    """

    __slots__ = (
        "annotations",
        "bundle",
        "created",
        "directory",
        "engine",
        "group",
        "machine",
        "name",
        "pid",
        "rootfs",
        "start",
    )

    def __init__(self, root: str, name: str) -> None:
        self.name = check_id(name)
        self.directory = f"{root}/{name}"
        self.bundle = self.rootfs = self.created = ""
        self.pid = self.start = 0
        self.group: Group | None = None
        self.annotations: dict[str, str] = {}
        # Of a bundle in a virtual machine: what runs it, and the machine's name.
        self.engine = self.machine = ""

    @property
    def fifo(self) -> str:
        """Where a created container waits."""
        return f"{self.directory}/exec.fifo"

    @classmethod
    def make(cls, root: str, name: str) -> State:
        """A new record.

        Raises:
            ConflictError: There is a container of that ID.
        """
        state = cls(root, name)
        os.makedirs(root, 0o700, exist_ok=True)
        try:
            os.mkdir(state.directory, 0o711)
        except FileExistsError as error:
            message = f"container with given ID already exists: {name}"
            raise ConflictError(message) from error
        return state

    @classmethod
    def load(cls, root: str, name: str) -> State:
        """The record of a container.

        Raises:
            NotFoundError: There is none.
        """
        state = cls(root, name)
        try:
            with open(f"{state.directory}/state.json", "rb") as file:
                fields = Fields(lean_json.loads(file.read(), f"the state of {name}"))
        except FileNotFoundError as error:
            # In runc's words, which engines look for.
            message = f"container does not exist: {name}"
            raise NotFoundError(message) from error
        state.bundle, state.rootfs = fields.text("bundle"), fields.text("rootfs")
        state.created = fields.text("created")
        state.pid, state.start = fields.integer("pid"), fields.integer("start")
        state.annotations = fields.mapping("annotations")
        state.engine, state.machine = fields.text("engine"), fields.text("machine")
        directories = [
            (entry.texts("controllers"), entry.text("path"), entry.integer("version"))
            for entry in fields.tables("cgroups")
        ]
        state.group = Group(directories, rootless=fields.flag("rootless"))
        return state

    def config(self) -> Fields:
        """The container's configuration as it was created."""
        with open(f"{self.directory}/config.json", "rb") as file:
            return Fields(lean_json.loads(file.read(), "the container's configuration"))

    def save(self) -> None:
        """Writes the record, whole or not at all."""
        group = self.group or Group([])
        document = {
            "id": self.name,
            "bundle": self.bundle,
            "rootfs": self.rootfs,
            "created": self.created,
            "pid": self.pid,
            "start": self.start,
            "annotations": self.annotations,
            "engine": self.engine,
            "machine": self.machine,
            "rootless": group.rootless,
            "cgroups": [
                {"controllers": names, "path": path, "version": version}
                for names, path, version in group.directories
            ],
        }
        new = f"{self.directory}/.state.json"
        with open(new, "w", encoding="utf-8") as file:
            file.write(lean_json.dumps(document))
        os.replace(new, f"{self.directory}/state.json")

    def save_config(self, source: str) -> None:
        """Keeps a copy of the configuration."""
        with open(source, "rb") as file, open(f"{self.directory}/config.json", "wb") as copy:
            copy.write(file.read())

    @property
    def alive(self) -> bool:
        """Whether the container's process is there, and is the one that was started."""
        letter, start = process_start(self.pid) if self.pid else ("", 0)
        return letter not in {"", "Z", "X"} and start == self.start

    @property
    def status(self) -> str:
        """``created``, ``running``, ``paused`` or ``stopped``."""
        if not self.alive:
            return "stopped"
        if self.group is not None and self.group.frozen():
            return "paused"
        return "created" if os.path.exists(self.fifo) else "running"

    def document(self, status: str | None = None) -> dict[str, object]:
        """The state as the specification has it, for hooks and for the state command."""
        status = status or self.status
        return {
            "ociVersion": "1.2.0",
            "id": self.name,
            "status": status,
            "pid": 0 if status == "stopped" else self.pid,
            "bundle": self.bundle,
            "annotations": self.annotations,
        }

    def remove(self) -> None:
        """Removes the record."""
        for name in ("exec.fifo", "state.json", ".state.json", "config.json"):
            try:
                os.unlink(f"{self.directory}/{name}")
            except FileNotFoundError:
                continue
        try:
            os.rmdir(self.directory)
        except FileNotFoundError:
            return

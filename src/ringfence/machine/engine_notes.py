"""What the engine `bt` tells of its translations, for whoever looks into it or profiles a guest.

``RINGFENCE_BT_TRACE=FILE`` writes each translation beside the guest's code. ``RINGFENCE_BT_PERF=1``
names translated code for ``perf``, in the file where it looks for the code of just-in-time compilers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError, HostError

if TYPE_CHECKING:
    from ringfence.machine.document import Document

__all__ = ["EngineNotes"]

_TRACE = "RINGFENCE_BT_TRACE"
_PERF = "RINGFENCE_BT_PERF"
# Not TMPDIR: this is where perf looks (jit-interface.txt in its documentation).
_PERF_MAPS = Path("/tmp")  # noqa: S108 - made with a name that nobody else has


class EngineNotes:
    """The files that the engine's notes go to, if they were asked for.

    Args:
        document: Told of them.
        engine: The engine's name.

    Raises:
        ConfigError: The engine translates nothing.
        HostError: A file can't be made.
    """

    def __init__(self, document: Document, engine: str) -> None:
        self._perf_map: Path | None = None
        fds: dict[str, int] = {}
        trace = os.environ.get(_TRACE)
        perf = os.environ.get(_PERF, "") not in ("", "0")
        if (trace or perf) and engine != "bt":
            message = (
                f"{_TRACE if trace else _PERF} is set, and the engine {engine} translates nothing"
            )
            raise ConfigError(message, hint="use --engine bt, or unset it")
        if trace:
            fds["trace_fd"] = _make(document, trace)
        if perf:
            fds["perf_map_fd"] = self._make_perf_map(document)
        if fds:
            document.set("notes", fds)

    def _make_perf_map(self, document: Document) -> int:
        try:
            fd, name = tempfile.mkstemp(prefix="ringfence-", suffix=".map", dir=_PERF_MAPS)
        except OSError as error:
            message = f"cannot make a file for perf in {_PERF_MAPS}: {error.strerror}"
            raise HostError(message, errno=error.errno, path=str(_PERF_MAPS)) from error
        self._perf_map = Path(name)
        return document.give(fd)

    def started(self, pid: int) -> None:
        """Gives the names to the process that perf will see: ``pid``, or its child in the jail.

        Perf reads them when it reports, so the file stays.
        """
        if self._perf_map is not None:
            self._perf_map.rename(_PERF_MAPS / f"perf-{_inner(pid)}.map")
            self._perf_map = None

    def close(self) -> None:
        """Takes the file away that no process was given."""
        if self._perf_map is not None:
            self._perf_map.unlink(missing_ok=True)


def _make(document: Document, path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return document.give(os.open(path, flags, 0o600))
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}"
        raise HostError(message, errno=error.errno, path=path) from error


def _inner(pid: int) -> int:
    """The VM process proper: where it has a process namespace, the only child of the first one."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return int(children[0]) if children else pid

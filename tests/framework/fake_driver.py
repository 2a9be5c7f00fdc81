"""A driver whose machines are nothing: their commands run on this host, as this user.

For tests of what stands on a driver. ``FakeDriver.started`` holds the machines that were started.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ringfence.errors import AgentError, GuestTimeout, NotFoundError
from ringfence.guest.agent import FileInfo, GuestStats
from ringfence.machine.driver import Ending, RunningInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ringfence.errors import RingfenceError
    from ringfence.guest.spec import ExecSpec, InterfaceSpec
    from ringfence.machine.driver import Place
    from ringfence.machine.phases import Phases
    from ringfence.machine.spec import MachineSpec
    from ringfence.network import LinkSpec


class FakeProcess:
    """A process of this host."""

    message = ""
    timed_out = False

    def __init__(self, spec: ExecSpec) -> None:
        self.spec = spec
        self._process = subprocess.Popen(
            spec.argv,
            env={"PATH": os.environ["PATH"], **spec.env},
            stdin=subprocess.PIPE if spec.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        # A descriptor that is closed under a reader may be another's a moment later.
        self._reading = threading.Lock()
        self.pid = self._process.pid
        self.stdin: BinaryIO = _given(self._process.stdin)
        self.stdout: BinaryIO = _given(self._process.stdout)
        self.stderr: BinaryIO = _given(self._process.stderr)

    def resize(self, columns: int, rows: int) -> None:
        pass

    def signal(self, number: int) -> None:
        os.killpg(self.pid, number)

    def poll(self) -> int | None:
        code = self._process.poll()
        return None if code is None else _as_a_shell(code)

    def wait(self, timeout_s: float | None = None) -> int:
        limit = self.spec.timeout_s
        try:
            code = self._process.wait(limit if limit is not None else timeout_s)
        except subprocess.TimeoutExpired as error:
            if limit is None:
                message = "it still runs"
                raise GuestTimeout(message) from error
            self.timed_out = True
            self.signal(signal.SIGKILL)
            code = self._process.wait()
        return _as_a_shell(code)

    def communicate(
        self, stdin: bytes = b"", timeout_s: float | None = None
    ) -> tuple[bytes, bytes]:
        with self._reading:
            try:
                return self._process.communicate(stdin or None, self.spec.timeout_s or timeout_s)
            except subprocess.TimeoutExpired:
                self.timed_out = True
                self.signal(signal.SIGKILL)
                return self._process.communicate()

    def close(self) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
        with self._reading:
            self._process.wait()
            for stream in (self.stdin, self.stdout, self.stderr):
                stream.close()


def _given(stream: BinaryIO | object) -> BinaryIO:
    return stream if isinstance(stream, io.BufferedIOBase) else io.BytesIO()  # type: ignore[return-value]


def _as_a_shell(code: int) -> int:
    return 128 - code if code < 0 else code


class FakeFiles:
    """Files below a directory of this host."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def _at(self, path: str) -> Path:
        return self.top / path.lstrip("/")

    def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    def write(
        self,
        path: str,
        data: bytes | Iterable[bytes],
        *,
        mode: int = 0o644,
        append: bool = False,
        user: str = "",
    ) -> int:
        whole = data if isinstance(data, bytes) else b"".join(data)
        self._at(path).parent.mkdir(parents=True, exist_ok=True)
        return self._at(path).write_bytes(whole)

    def list(self, path: str) -> list[FileInfo]:
        return [self.stat(f"{path}/{entry.name}") for entry in sorted(self._at(path).iterdir())]

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        found = self._at(path).stat()
        kind = "directory" if self._at(path).is_dir() else "file"
        return FileInfo(
            name=Path(path).name,
            type=kind,
            size=found.st_size,
            mode=found.st_mode & 0o7777,
            uid=found.st_uid,
            gid=found.st_gid,
            mtime_ns=found.st_mtime_ns,
        )

    def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        self._at(path).mkdir(parents=parents, exist_ok=parents)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        self._at(path).unlink()

    def rename(self, source: str, target: str) -> None:
        self._at(source).rename(self._at(target))

    def tar_in(self, path: str, chunks: Iterable[bytes], *, owner: bool = False) -> None:
        raise NotImplementedError

    def tar_out(self, path: str) -> Iterator[bytes]:
        raise NotImplementedError

    def copy_in(self, source: Path, target: str) -> None:
        self.write(target, source.read_bytes())

    def copy_out(self, source: str, target: Path) -> None:
        target.write_bytes(self.read(source))


class FakeAgent:
    """Runs commands as processes of this host."""

    def __init__(self, machine: FakeMachine, top: Path) -> None:
        self._machine = machine
        self.files = FakeFiles(top)
        self.commands: list[ExecSpec] = []

    def exec(self, spec: ExecSpec) -> FakeProcess:
        if self._machine.ending is not None:
            message = "nobody answers"
            raise AgentError(message)
        self.commands.append(spec)
        return FakeProcess(spec)

    def stats(self) -> GuestStats:
        return GuestStats(
            uptime_s=1.0,
            memory_total_bytes=512 << 20,
            memory_available_bytes=256 << 20,
            cpu_user_s=1.0,
            cpu_system_s=0.5,
            cpu_idle_s=8.0,
            load_1=0.1,
            processes=3,
            cpus=1,
        )

    def add_interface(self, interface: InterfaceSpec) -> None:
        pass

    def remove_interface(self, mac: str) -> None:
        pass

    def power_off(self, *, reboot: bool = False, grace_s: float = 5.0) -> None:
        self._machine.end(Ending(reason="poweroff", message="the guest turned itself off"))

    def close(self) -> None:
        pass


class FakeMachine:
    """A machine that is nothing."""

    def __init__(self, spec: MachineSpec, top: Path) -> None:
        self.spec = spec
        self.agent = FakeAgent(self, top)
        self.info = RunningInfo(engine=spec.engine, pid=os.getpid(), kernel="6.1.0-fake")
        self.ending: Ending | None = None
        self.closed = False
        self.links = {link.network: link for link in spec.links}
        self.state = "running"
        self._changed = threading.Condition()

    def end(self, ending: Ending) -> None:
        with self._changed:
            self.ending = self.ending or ending
            self._changed.notify_all()

    def await_ready(self) -> None:
        return

    def pause(self) -> None:
        self.state = "paused"

    def resume(self) -> None:
        self.state = "running"

    def balloon(self, target_mib: int) -> None:
        self.state = f"without {target_mib}"

    def kill(self) -> None:
        self.end(Ending(reason="killed", message="it was killed"))

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        with self._changed:
            self._changed.wait_for(lambda: self.ending is not None, timeout_s)
            return self.ending

    def stats(self, *, engine_counters: bool = False) -> Mapping[str, object]:
        return {"state": self.state, "engine": {"blocks": 7}} if engine_counters else {}

    def inspect(self) -> Mapping[str, object]:
        return {"state": self.state}

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(self.links)

    def connect(self, link: LinkSpec) -> Mapping[str, object]:
        self.links[link.network] = link
        return {"network": link.network, "addresses": list(link.addresses)}

    def disconnect(self, network: str) -> None:
        if self.links.pop(network, None) is None:
            message = f"not on {network}"
            raise NotFoundError(message)

    def close(self) -> None:
        self.kill()
        self.closed = True


class FakeDriver:
    """Starts them, or fails as it is told."""

    def __init__(self, *, fail: RingfenceError | None = None) -> None:
        self.fail = fail
        self.started: list[FakeMachine] = []
        self.cleared: list[str] = []

    def start(self, spec: MachineSpec, place: Place, phases: Phases) -> FakeMachine:
        with phases.measure("fake"):
            place.sockets.mkdir(parents=True)
            if self.fail is not None:
                raise self.fail
            top = place.folder / "guest"
            top.mkdir()
            machine = FakeMachine(spec, top)
            self.started.append(machine)
            return machine

    def attach(self, place: Place) -> FakeAgent:
        return self.started[-1].agent

    def clear(self, place: Place) -> None:
        self.cleared.append(place.machine_id)

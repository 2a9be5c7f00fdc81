"""Control groups of hosts on which systemd gives them out: a scope for each container.

systemd wants to be the one writer of its tree, so it is asked for a scope, which it makes with the
process that is to be in it. That is one which only waits: the container's own enters the scope's
directories by itself, as any container's does, and then nobody needs the first any more.

Source: systemd.scope(5), org.freedesktop.systemd1(5); the path's form is runc's.
"""

from __future__ import annotations

import os

from ringfence.errors import ConfigError, HostError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.container.fields import Fields

__all__ = ["Scope", "is_running"]

_MANAGER = (
    "org.freedesktop.systemd1",
    "/org/freedesktop/systemd1",
    "org.freedesktop.systemd1.Manager",
)
_SLICE, _PREFIX = "system.slice", "ringfence"
_WAIT_S = 10.0
_SECOND_US = 1_000_000
_UNLIMITED = 2**64 - 1


def is_running() -> bool:
    """Whether systemd runs this host (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


class Scope:
    """A container's scope.

    Args:
        text: The configuration's ``cgroupsPath``: ``SLICE:PREFIX:NAME``, or empty.
        name: The container's ID.

    Raises:
        ConfigError: The path isn't of that form.
    """

    __slots__ = ("_holder", "slice", "unit")

    def __init__(self, text: str, name: str) -> None:
        parts = text.split(":") if text else ["", _PREFIX, name]
        if len(parts) != 3 or not parts[2] or "/" in text:
            message = (
                'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, '
                f"got {text!r} instead"
            )
            raise ConfigError(message)
        self.slice = parts[0] or (_SLICE if os.geteuid() == 0 else "user.slice")
        if not self.slice.endswith(".slice"):
            message = f"{self.slice!r} isn't the name of a slice"
            raise ConfigError(message)
        self.unit = parts[2]
        if not self.unit.endswith(".slice"):
            self.unit = f"{parts[1]}-{parts[2]}.scope"
        self._holder = 0

    @property
    def path(self) -> str:
        """Its cgroup, from the hierarchy's root."""
        above = ""
        words = self.slice.removesuffix(".slice")
        if words != "-":
            names = words.split("-")
            above = "".join(f"/{'-'.join(names[: count + 1])}.slice" for count in range(len(names)))
        uid = os.geteuid()
        own = f"/user.slice/user-{uid}.slice/user@{uid}.service" if uid else ""
        return f"{own}{above}/{self.unit}"

    def properties(self, pid: int, resources: Fields) -> list[str]:
        """What systemd is told of it, in the words of ``busctl``.

        Limits are said here too: systemd sets those that it knows again when it is reloaded.
        """
        found = [
            ("Description", "s", f"ringfence container {self.unit}"),
            ("Slice", "s", self.slice),
            ("DefaultDependencies", "b", "false"),
            ("Delegate", "b", "true"),
        ]
        found += [(f"{kind}Accounting", "b", "true") for kind in ("Memory", "CPU", "Tasks", "IO")]
        memory = resources.table("memory").integer("limit")
        if memory:
            found.append(("MemoryMax", "t", str(memory if memory > 0 else _UNLIMITED)))
        tasks = resources.table("pids").optional_integer("limit")
        if tasks is not None:
            found.append(("TasksMax", "t", str(max(tasks, 1) if tasks >= 0 else _UNLIMITED)))
        cpu = resources.table("cpu")
        if cpu.integer("quota") > 0:
            period = cpu.integer("period") or 100_000
            share = cpu.integer("quota") * _SECOND_US // period
            found.append(("CPUQuotaPerSecUSec", "t", str(share)))
        words = [word for entry in found for word in entry]
        return [str(len(found) + 1), *words, "PIDs", "au", "1", str(pid)]

    def start(self, resources: Fields) -> None:
        """Has it made, with a process in it that only waits.

        Raises:
            NotFoundError: ``busctl`` isn't installed.
            HostError: systemd refused, or didn't make it.
        """
        import shutil
        import subprocess

        program = shutil.which("busctl", path=f"{os.environ.get('PATH', '')}:/usr/bin:/bin")
        if program is None:
            message = "busctl is needed to ask systemd for control groups, and isn't installed"
            raise NotFoundError(message, hint="apt install systemd")
        self._holder = os.posix_spawnp("sleep", ["sleep", "60"], os.environ)
        bus = [program, "--user"] if os.geteuid() else [program]
        call = [
            *bus, "call", *_MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", self.unit, "replace",
            *self.properties(self._holder, resources), "0",
        ]  # fmt: skip
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            self.release()
            message = f"systemd made no scope {self.unit}: {done.stderr.strip()}"
            raise HostError(message)
        self._await()

    def _await(self) -> None:
        from time import monotonic, sleep

        end = monotonic() + _WAIT_S
        while monotonic() < end:
            with open(f"/proc/{self._holder}/cgroup", encoding="utf-8") as file:
                if any(line.rstrip("\n").endswith(f"/{self.unit}") for line in file):
                    return
            sleep(0.005)
        self.release()
        message = f"systemd doesn't make the scope {self.unit}"
        raise HostError(message)

    def release(self) -> None:
        """Ends the process that only waits; the scope is there for as long as others are in it."""
        if self._holder:
            try:
                os.kill(self._holder, 9)
                os.waitpid(self._holder, 0)
            except (ChildProcessError, ProcessLookupError):
                pass
            self._holder = 0

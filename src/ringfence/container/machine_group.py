"""The control groups of machines that are containers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ringfence.container.cgroups import devices, layout
from ringfence.container.cgroups.group import Group
from ringfence.container.fields import Fields
from ringfence.errors import HostError, UnsupportedError

if TYPE_CHECKING:
    from ringfence.machine.driver import Place
    from ringfence.machine.spec import MachineSpec

__all__ = ["limit", "of_running", "plan", "remove"]

_FILE = "cgroups"
_PIDS = 4096
_CPU_PERIOD_US = 100_000


def plan(place: Place) -> Group:
    """A new machine's groups; they aren't made yet.

    Where they are is written down first: another process finds them by that, whatever group it is
    in itself, and removes them should this one be killed.

    Raises:
        HostError: It can't be read what control groups there are.
    """
    hierarchies = layout.detect()
    # Below a group that has processes, version 2 gives no controllers. No group of all machines is
    # between: making and emptying one in ten hierarchies is a good part of a start.
    top = "/" if hierarchies.unified and os.geteuid() == 0 else ""
    path = f"{top}ringfence-{place.machine_id}"
    group = Group.plan(path, rootless=os.geteuid() != 0, layout=hierarchies)
    lines = [f"{version} {','.join(names)} {path}" for names, path, version in group.directories]
    (place.folder / _FILE).write_bytes(os.fsencode("\n".join(lines)))
    return group


def of_running(place: Place) -> Group:
    """The groups of a machine that runs, or whose holder has died; none where none are known."""
    try:
        lines = os.fsdecode((place.folder / _FILE).read_bytes()).split("\n")
    except OSError:
        return Group([])
    found = []
    for line in filter(None, lines):
        version, names, path = line.split(" ", 2)
        if os.path.isdir(path):
            found.append((names.split(","), path, int(version)))
    return Group(found, rootless=os.geteuid() != 0)


def limit(group: Group, spec: MachineSpec) -> dict[str, object]:
    """Gives a machine what it may use; returns what the setup program has to do for it.

    Raises:
        HostError: The kernel refused a value.
        UnsupportedError: This host can't limit something.
    """
    size = spec.memory_mib << 20
    document = {
        # Swap would be the host's: none of it, as in a VM.
        "memory": {"limit": size},
        "cpu": {"quota": spec.vcpus * _CPU_PERIOD_US, "period": _CPU_PERIOD_US},
        "pids": {"limit": _PIDS},
    }
    try:
        group.limit(Fields(document))
    except (UnsupportedError, HostError):
        if not group.rootless:
            raise
        # Without delegation a user's machine has the user's own limits.
    return devices.apply(group, devices.rules(Fields(_NO_DEVICES)))


_NO_DEVICES = {"devices": [{"allow": False, "access": "rwm"}]}


def remove(group: Group) -> None:
    """Ends what is in the groups, and removes them."""
    if group.processes():
        group.kill()
    group.remove()

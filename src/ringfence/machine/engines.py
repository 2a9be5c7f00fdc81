"""Which engine runs a machine: the one that was asked for, or the best that this host has."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ringfence.errors import ConfigError, UnsupportedError
from ringfence.host import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ringfence.machine.driver import Driver
    from ringfence.machine.spec import EngineName

__all__ = ["Choice", "choose", "load_driver"]

# Drivers by engine; a module is imported when a machine is of its engine.
_DRIVERS: Mapping[str, str] = {
    "kvm": "ringfence.machine.vm_driver",
    "bt": "ringfence.machine.vm_driver",
    "container": "ringfence.container.driver",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An engine and why it is this one.

    Args:
        engine: Its name.
        reason: In a sentence.
    """

    engine: str
    reason: str


def choose(wanted: EngineName) -> Choice:
    """The engine for a machine.

    ``auto`` takes ``kvm`` where it was measured to run on the processor, else ``bt``: both are
    real machines with a kernel of their own. It never takes less isolation for more speed.

    Raises:
        UnsupportedError: What was asked for can't run here; the hint is the remedy.
    """
    if wanted == "kvm":
        found = probe.kvm()
        if found.verdict != "usable":
            message = f"the engine kvm can't run machines here: {found.summary}"
            raise UnsupportedError(message, hint=found.remedy or "use --engine bt")
        return Choice(engine="kvm", reason="asked for")
    if wanted != "auto":
        return Choice(engine=wanted, reason="asked for")
    found = probe.kvm()
    if found.verdict == "usable":
        return Choice(engine="kvm", reason=found.summary)
    return Choice(engine="bt", reason=f"no usable KVM: {found.summary}")


def load_driver(engine: str) -> Driver:
    """The driver of an engine.

    Raises:
        ConfigError: There is no such engine.
        UnsupportedError: This installation doesn't have it.
    """
    name = _DRIVERS.get(engine)
    if name is None:
        message = f"there is no engine {engine!r}"
        raise ConfigError(message, hint=f"choose one of {', '.join(_DRIVERS)}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        message = f"this installation has no engine {engine!r}"
        raise UnsupportedError(message) from error
    make = cast("Callable[[], Driver]", module.driver)
    return make()

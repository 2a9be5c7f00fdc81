"""What other processes may ask of a machine's holder, by its control socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.machine.driver import Running
    from ringfence.machine.machine import Machine

__all__ = ["methods"]

_STOP_GRACE_S = 10.0

Json = dict[str, object]


def methods(machine: Machine, running: Running) -> dict[str, Callable[[Json], Json]]:
    """What is done for each request."""

    def stop(request: Json) -> None:
        machine.stop(float(str(request.get("timeout_s", _STOP_GRACE_S))))

    def connect(request: Json) -> Json:
        given = request.get("ip")
        addresses = tuple(str(one) for one in given) if isinstance(given, list) else ()
        mac = str(request.get("mac") or "")
        return dict(machine.connect(str(request.get("network")), ip=addresses, mac=mac))

    def stats(request: Json) -> Json:
        return dict(running.stats(engine_counters=bool(request.get("engine_counters"))))

    return {
        "stats": stats,
        "inspect": lambda _: dict(running.inspect()),
        "pause": _silent(lambda _: machine.pause()),
        "resume": _silent(lambda _: machine.resume()),
        "stop": _silent(stop),
        "kill": _silent(lambda _: machine.kill()),
        "connect": connect,
        "disconnect": _silent(lambda request: machine.disconnect(str(request.get("network")))),
    }


def _silent(act: Callable[[Json], None]) -> Callable[[Json], Json]:
    def answer(request: Json) -> Json:
        act(request)
        return {}

    return answer

"""``ringfence stats``: what machines use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.cli import output
from ringfence.errors import RingfenceError
from ringfence.machine import state
from ringfence.machine.attached import AttachedMachine

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help="names or IDs (all)")
    parser.add_argument(
        "--engine-counters", action="store_true", help="what the engine counted, as JSON"
    )
    output.add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    names = args.machines or [
        entry.record.name for entry in state.list_machines() if entry.record.status == "running"
    ]
    found = [_stats(name, engine_counters=args.engine_counters) for name in names]
    if args.format == "json" or args.engine_counters:
        output.print_json(found)
    else:
        heads = ("NAME", "ENGINE", "CPU TIME", "MEMORY", "OF", "PROCESSES")
        output.print_table(heads, [_row(entry) for entry in found])
    return 0


def _stats(name: str, *, engine_counters: bool) -> dict[str, object]:
    with AttachedMachine(name) as machine:
        record = machine.entry.record
        found: dict[str, object] = {"name": record.name, "id": record.id, "engine": record.engine}
        found["host"] = machine.ask("stats", engine_counters=engine_counters)
        try:
            guest = machine.guest_stats()
        except RingfenceError as error:
            found["guest"] = {"error": error.message}
        else:
            used = guest.memory_total_bytes - guest.memory_available_bytes
            found["guest"] = {
                "uptime_s": guest.uptime_s,
                "cpu_s": guest.cpu_user_s + guest.cpu_system_s,
                "load_1": guest.load_1,
                "memory_total_bytes": guest.memory_total_bytes,
                "memory_used_bytes": used,
                "processes": guest.processes,
                "cpus": guest.cpus,
            }
        return found


def _row(found: dict[str, object]) -> tuple[str, ...]:
    guest = found["guest"]
    if not isinstance(guest, dict) or "error" in guest:
        return (str(found["name"]), str(found["engine"]), "-", "-", "-", "-")
    return (
        str(found["name"]),
        str(found["engine"]),
        f"{float(guest['cpu_s']):.1f} s",
        output.size(float(guest["memory_used_bytes"])),
        output.size(float(guest["memory_total_bytes"])),
        str(guest["processes"]),
    )

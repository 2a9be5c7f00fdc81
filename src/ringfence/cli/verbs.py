"""All verbs: where each is, and what it does in a line."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GROUPS", "VERBS", "Verb"]


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb.

    Args:
        module: Where its ``configure`` and ``run`` are.
        summary: What it does, as the help shows it.
        group: Under which heading.
    """

    module: str
    summary: str
    group: str


GROUPS = ("Run", "Machines", "Images", "Networks", "Host")

VERBS: dict[str, Verb] = {
    "run": Verb("ringfence.cli.run", "run a command in a new machine", "Run"),
    "exec": Verb("ringfence.cli.exec", "run a command in a running machine", "Run"),
    "ps": Verb("ringfence.cli.ps", "list machines", "Machines"),
    "cp": Verb("ringfence.cli.cp", "copy files between a machine and the host", "Machines"),
    "logs": Verb("ringfence.cli.logs", "show what a machine's command wrote", "Machines"),
    "inspect": Verb("ringfence.cli.inspect", "show what a machine is, as JSON", "Machines"),
    "stats": Verb("ringfence.cli.stats", "show what machines use", "Machines"),
    "pause": Verb("ringfence.cli.pause", "stop a machine where it is", "Machines"),
    "resume": Verb("ringfence.cli.resume", "let a paused machine go on", "Machines"),
    "stop": Verb("ringfence.cli.stop", "end machines in good order", "Machines"),
    "kill": Verb("ringfence.cli.kill", "end machines at once", "Machines"),
    "rm": Verb("ringfence.cli.rm", "forget ended machines and their logs", "Machines"),
    "image": Verb(
        "ringfence.cli.image",
        "fetch, build, list, send and write out images",
        "Images",
    ),
    "network": Verb(
        "ringfence.cli.network",
        "make, list, watch and remove networks",
        "Networks",
    ),
    "doctor": Verb(
        "ringfence.cli.doctor",
        "show what this host can run, and how to mend it",
        "Host",
    ),
    "kernel": Verb("ringfence.cli.kernel", "list, fetch and import guest kernels", "Host"),
    "completion": Verb("ringfence.cli.completion", "print a shell's completion script", "Host"),
}

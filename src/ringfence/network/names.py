"""The name server of a network of the host's kernel that has rules about names: started, told, ended.

In a network of its own it has the host's address and port 53. On a LAN those belong to the LAN:
there each machine has a door, a port of the host's address that the packet filter leads what the
machine asks to, whomever it asks (:mod:`ringfence.network.lan_rules`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ringfence.errors import HostError
from ringfence.network import addresses, dnsmasq, egress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ringfence.network.dnsmasq import Serving
    from ringfence.network.egress import Owner
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["apply", "apply_doors", "doors", "refusals", "stop"]

_PROGRAM = Path(__file__).with_name("_names_server.py")
_DOORS = "names-doors.json"
_FILES = ("names.pid", "names.json", "names.log", "names-refused.json", _DOORS)
_READ_S = 5.0


def _document(
    serving: Serving, table: str, spec: NetworkSpec, members: Sequence[Member]
) -> dict[str, object]:
    everyone = egress.owners(spec, members)
    names = {name.lower(): own for name, own in serving.known.items()}
    return {
        **_common("inet", table, everyone),
        "listen": list(serving.first),
        "servers": addresses.host_nameservers() if serving.routed else [],
        "servers_of": {ip: list(one.dns) for one in members if one.dns for ip in one.addresses},
        "names": {**names, dnsmasq.HOST_NAME: list(serving.first)},
        "machines": {ip: owner.key for owner in everyone for ip in owner.addresses},
    }


def _common(family: str, table: str, everyone: Sequence[Owner]) -> dict[str, object]:
    return {
        "family": family,
        "table": table,
        "nft": shutil.which("nft") or "/usr/sbin/nft",
        "policies": {owner.key: _policy(owner) for owner in everyone},
    }


def _policy(owner: Owner) -> dict[str, object]:
    policy = owner.policy
    rules = [
        {
            "action": rule.action,
            "domain": rule.domain,
            "narrow": bool(rule.ports or rule.transport),
            "pins": egress.pin_set(owner, rule, 4).removesuffix("_4"),
        }
        for rule in policy.rules
        if rule.domain
    ]
    return {"closed": policy.refuses_by_default and not policy.resolve_all, "rules": rules}


def apply(serving: Serving, table: str, spec: NetworkSpec, members: Sequence[Member]) -> None:
    """Tells the name server who is on the network and what holds; starts it when it doesn't run.

    Raises:
        HostError: It can't be started.
    """
    _tell(serving.folder, _document(serving, table, spec, members))


def doors(folder: Path) -> dict[str, list[str]]:
    """By machines' names where their doors were when they were told last."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / _DOORS).read_text())
        return cast("dict[str, list[str]]", found["doors"])
    return {}


def apply_doors(
    folder: Path,
    table: str,
    spec: NetworkSpec,
    machines: Mapping[str, tuple[Member, Sequence[str]]],
    known: Mapping[str, list[str]],
) -> dict[str, list[str]]:
    """Likewise on a LAN, where each machine that is served has doors of its own.

    Args:
        folder: For files.
        table: Whose sets get the addresses that are answered.
        spec: The network.
        machines: Those that are served by their names, each with the host's addresses that its doors are at.
        known: The names that are answered.

    Returns:
        By machines' names where their doors are: ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``.

    Raises:
        HostError: It can't be started.
    """
    network, *everyone = egress.owners(spec, [member for member, _ in machines.values()])
    token = secrets.token_hex(8)
    document = {
        **_common("bridge", table, [network, *everyone]),
        "listen": [],
        "servers": addresses.host_nameservers(),
        "servers_of": {name: list(one.dns) for name, (one, _) in machines.items() if one.dns},
        "names": {name.lower(): own for name, own in known.items() if own},
        "machines": {name: owner.key for name, owner in zip(machines, everyone, strict=True)},
        "doors": {name: list(own) for name, (_, own) in machines.items()},
        "token": token,
    }
    _tell(folder, document)
    deadline = time.monotonic() + _READ_S
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            found = json.loads((folder / _DOORS).read_text())
            if found["token"] == token:
                return cast("dict[str, list[str]]", found["doors"])
        time.sleep(0.002)
    message = "the network's name server doesn't answer"
    raise HostError(message, hint=f"its last words are in {folder / 'names.log'}")


def _tell(folder: Path, document: Mapping[str, object]) -> None:
    fresh = folder / ".names.json"
    fresh.write_text(json.dumps(document))
    fresh.rename(folder / "names.json")
    pid = dnsmasq.running(folder, "names.pid")
    if pid is not None:
        os.kill(pid, signal.SIGHUP)
        return
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        with (folder / "names.log").open("ab") as log:
            words = [sys.executable, "-IS", str(_PROGRAM), str(folder), str(theirs)]
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs],
                start_new_session=True,
            )  # fmt: skip
        dnsmasq.CHILDREN.append(process)
        (folder / "names.pid").write_text(f"{process.pid}\n")
        os.close(theirs)
        theirs = -1
        if not os.read(ours, 1):
            words = (folder / "names.log").read_text(errors="replace").splitlines()[-1:]
            message = f"cannot start the network's name server: {''.join(words)}"
            raise HostError(message)
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def refusals(folder: Path) -> list[dict[str, object]]:
    """The names that machines asked for and were refused."""
    with suppress(OSError, ValueError):
        return cast(
            "list[dict[str, object]]", json.loads((folder / "names-refused.json").read_text())
        )
    return []


def stop(folder: Path) -> None:
    """Ends it, if it runs."""
    pid = dnsmasq.running(folder, "names.pid")
    if pid is not None:
        dnsmasq.end(pid)
    for name in _FILES:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)

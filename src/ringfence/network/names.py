"""The name server of a network of the host's kernel that has rules about names: started, told, ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ringfence.errors import HostError
from ringfence.network import addresses, dnsmasq, egress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.network.dnsmasq import Serving
    from ringfence.network.egress import Owner
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["apply", "refusals", "stop"]

_PROGRAM = Path(__file__).with_name("_names_server.py")
_FILES = ("names.pid", "names.json", "names.log", "names-refused.json")


def _document(
    serving: Serving, table: str, spec: NetworkSpec, members: Sequence[Member]
) -> dict[str, object]:
    everyone = egress.owners(spec, members)
    names = {name.lower(): own for name, own in serving.known.items()}
    return {
        "table": table,
        "nft": shutil.which("nft") or "/usr/sbin/nft",
        "listen": list(serving.first),
        "servers": addresses.host_nameservers() if serving.routed else [],
        "servers_of": {ip: list(one.dns) for one in members if one.dns for ip in one.addresses},
        "names": {**names, dnsmasq.HOST_NAME: list(serving.first)},
        "machines": {ip: owner.key for owner in everyone for ip in owner.addresses},
        "policies": {owner.key: _policy(owner) for owner in everyone},
    }


def _policy(owner: Owner) -> dict[str, object]:
    policy = owner.policy
    rules = [
        {
            "action": rule.action,
            "domain": rule.domain,
            "narrow": bool(rule.ports or rule.transport),
            "pins": egress.pin_set(owner, index, 4).removesuffix("_4"),
        }
        for index, rule in enumerate(policy.rules)
        if rule.domain
    ]
    return {"closed": policy.refuses_by_default and not policy.resolve_all, "rules": rules}


def apply(serving: Serving, table: str, spec: NetworkSpec, members: Sequence[Member]) -> None:
    """Tells the name server who is on the network and what holds; starts it when it doesn't run.

    Raises:
        HostError: It can't be started.
    """
    folder = serving.folder
    fresh = folder / ".names.json"
    fresh.write_text(json.dumps(_document(serving, table, spec, members)))
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

"""What it costs a machine on ``nat`` that its connections have to show their names: they go through a relay.

A Linux stack in a network namespace plays the machine, and another one the host outside. Needs root.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

from benchmarks.network import AT_ONCE, HOSTS, SECONDS, SHORT, outside, programs
from benchmarks.results import Row, Suite
from ringfence.network import AttachOptions, Policy, attach
from tests.framework.networks import Namespace, Peer

if TYPE_CHECKING:
    from benchmarks.results import Log

_POLICIES = {"no rules": Policy(), "rules about names": Policy(deny=["evil.example"])}


def run(rounds: int, *, log: Log) -> list[Suite]:
    """Measures.

    Args:
        rounds: How often each is done, with and without rules in turn.
        log: Gets a line for each step.
    """
    suite = Suite(name="network: nat", columns=tuple(_POLICIES))
    if os.geteuid() != 0 or shutil.which("iperf3") is None:
        suite.notes.append("not run: needs root and iperf3")
        return [suite]
    with outside() as peer:
        for number in range(rounds):
            for name, policy in _POLICIES.items():
                log(f"{suite.name}: round {number + 1} of {rounds}, {name}\n")
                options = AttachOptions(policy=policy)
                with Namespace() as guest, attach("nat", "bench", "container", options) as link:
                    link.enter(guest.pid)
                    _measure(suite, guest, peer, name)
    for work in dict.fromkeys(key.partition("/")[0] for key in suite.series):
        found = [suite.series[f"{work}/{name}"] for name in _POLICIES]
        cells = tuple(f"{one.median:.3g} {one.unit}" for one in found)
        suite.rows.append(Row(name=work, cells=cells))
    return [suite]


def _measure(suite: Suite, guest: Namespace, peer: Peer, system: str) -> None:
    for work, options in (("TCP out", ()), ("TCP in", ("-R",))):
        words = ("iperf3", "-c", peer.v4, "-t", str(SECONDS), "-J", *options)
        done = json.loads(guest.run(*words).stdout)
        bits = float(done["end"]["sum_received"]["bits_per_second"])
        suite.add(work, system, bits / 1e9, "Gbit/s")
    for (work, source), count in zip(programs().items(), (SHORT, AT_ONCE), strict=True):
        done = guest.python(source, str(count), *HOSTS)
        suite.add(work, system, float(done), "1/s")

"""Tables of the host's packet filter, written whole and at once, by ``nft``.

What was counted and noted stays when a table is written anew: only its chains are replaced.

Source: ``nft(8)``, ``libnftables-json(5)``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ringfence.errors import HostError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Table", "delete", "listed", "refusing", "run", "write"]

_TIMEOUT_S = 30.0

Found = dict[str, dict[str, object]]


@dataclass(kw_only=True)
class Table:
    """A table as it shall be.

    Args:
        family: ``inet`` or ``bridge``.
        name: Its name.
        counters: Counters by name.
        sets: Sets by name, with what is inside their braces.
        chains: Chains by name, with their rules.
        hooks: Where some chains are called, as inside their braces.
    """

    family: str
    name: str
    counters: tuple[str, ...] = ()
    sets: dict[str, str] = field(default_factory=dict)
    chains: dict[str, list[str]] = field(default_factory=dict)
    hooks: dict[str, str] = field(default_factory=dict)

    def chain(self, name: str, rules: Iterable[str], hook: str = "") -> None:
        """Adds a chain."""
        self.chains[name] = list(rules)
        if hook:
            self.hooks[name] = hook


def run(*words: str, script: str = "") -> str:
    """Runs ``nft``.

    Raises:
        UnsupportedError: There is none.
        HostError: The kernel refuses.
    """
    program = shutil.which("nft") or "/usr/sbin/nft"
    try:
        done = subprocess.run(
            [program, *words],
            input=script,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        message = "the program nft is missing"
        raise UnsupportedError(message, hint="apt install nftables") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        message = f"the host's kernel refuses the network's rules: {said[0] if said else ''}"
        raise HostError(message, hint="modprobe nf_tables nft_chain_nat nft_masq")
    return done.stdout


def listed(family: str, name: str, *, terse: bool = False) -> Iterator[tuple[str, Found]]:
    """What is in a table: kind and fields of each object; nothing when there is no such table."""
    yield from _all(*(["-t"] if terse else []), "list", "table", family, name)


def refusing(hook: str, link: str) -> list[str]:
    """Others' chains that drop what nobody admits, in tables that say nothing of a link of ours.

    Args:
        hook: ``forward`` or ``input``.
        link: The link's name.

    Returns:
        The chains, as ``FAMILY TABLE CHAIN``.
    """
    found = []
    for kind, chain in _all("list", "chains"):
        here = kind == "chain" and str(chain.get("hook")) == hook
        if here and str(chain.get("policy")) == "drop":
            family, table = str(chain["family"]), str(chain["table"])
            rules = json.dumps(list(_all("list", "table", family, table)))
            if family in ("ip", "ip6", "inet") and f'"{link}"' not in rules:
                found.append(f"{family} {table} {chain['name']}")
    return found


def _all(*words: str) -> Iterator[tuple[str, Found]]:
    try:
        found = json.loads(run("-j", *words))
    except (HostError, ValueError):
        return
    for one in cast("list[dict[str, Found]]", found.get("nftables", [])):
        yield from one.items()


def _lines(table: Table) -> Iterator[str]:
    where = f"{table.family} {table.name}"
    old: dict[str, list[str]] = {"chain": [], "set": [], "counter": []}
    for kind, fields in listed(table.family, table.name, terse=True):
        if kind in old:
            old[kind].append(str(fields["name"]))
    yield f"add table {where}"
    yield from (f"flush chain {where} {name}" for name in old["chain"])
    for name in table.counters:
        if name not in old["counter"]:
            yield f"add counter {where} {name}"
    for name, inside in table.sets.items():
        if name not in old["set"]:
            yield f"add set {where} {name} {{ {inside}; }}"
    for name in table.chains:
        hook = table.hooks.get(name)
        yield f"add chain {where} {name}" + (f" {{ {hook} }}" if hook else "")
    for name, rules in table.chains.items():
        yield from (f"add rule {where} {name} {rule}" for rule in rules)
    for kind, kept in (("chain", table.chains), ("set", table.sets)):
        yield from (f"delete {kind} {where} {name}" for name in old[kind] if name not in kept)


def write(*tables: Table) -> None:
    """Makes tables what they shall be, all of it or nothing.

    Raises:
        HostError: The kernel refuses.
        UnsupportedError: There is no nft.
    """
    run("-f", "-", script="\n".join(line for table in tables for line in _lines(table)) + "\n")


def delete(name: str) -> None:
    """Takes a network's tables away, if they are there.

    Raises:
        HostError: The kernel refuses.
    """
    kinds = ("inet", "bridge")
    lines = [f"{word} table {kind} {name}" for kind in kinds for word in ("add", "delete")]
    run("-f", "-", script="\n".join(lines) + "\n")

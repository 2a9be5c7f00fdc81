"""Egress rules: who a machine may reach."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, cast

from ringfence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Policy", "Rule", "parse_rule"]

Action = Literal["allow", "deny"]
Transport = Literal["tcp", "udp", "icmp"]

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_TRANSPORTS = ("tcp", "udp", "icmp")
# Ranges by name.
_NAMED = {
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    "host": ("127.0.0.1", "::1"),
    "metadata": ("169.254.169.254", "fd00:ec2::254"),
    "any": ("0.0.0.0/0", "::/0"),
}
_HINT = (
    "write ADDRESS, CIDR, DOMAIN, *.DOMAIN, private, host, metadata or any, "
    "with :PORT or :FIRST-LAST and /tcp or /udp behind if need be; IPv6 in brackets before a port"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule, about exactly one of a range of addresses and a domain.

    Args:
        action: What it does.
        cidr: ``10.0.0.0/8``, ``fd00::/8``, or one address.
        domain: ``example.com``, or ``*.example.com`` for all names below it.
        ports: First and last port of each range; all when empty.
        transport: All when None.
    """

    action: Action
    cidr: str = ""
    domain: str = ""
    ports: tuple[tuple[int, int], ...] = ()
    transport: Transport | None = None

    def document(self) -> dict[str, object]:
        """As the gateway reads it."""
        found: dict[str, object] = {"action": self.action}
        if self.cidr:
            found["cidr"] = self.cidr
        else:
            found["domain"] = self.domain
        if self.ports:
            found["ports"] = [list(ports) for ports in self.ports]
        if self.transport is not None:
            found["transport"] = self.transport
        return found

    @classmethod
    def of(cls, document: Mapping[str, object]) -> Self:
        """The rule of what :meth:`document` said."""
        ports = cast("list[list[int]]", document.get("ports") or [])
        return cls(
            action=cast("Action", document["action"]),
            cidr=str(document.get("cidr") or ""),
            domain=str(document.get("domain") or ""),
            ports=tuple((first, last) for first, last in ports),
            transport=cast("Transport | None", document.get("transport")),
        )

    def __str__(self) -> str:
        """As it is written."""
        subject = self.cidr or self.domain
        ports = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in self.ports)
        if ports:
            subject = f"[{subject}]:{ports}" if ":" in subject else f"{subject}:{ports}"
        return f"{self.action} {subject}" + (f"/{self.transport}" if self.transport else "")


def parse_rule(action: Action, text: str) -> tuple[Rule, ...]:
    """The rules that a text stands for: a named range is several.

    Args:
        action: What they do.
        text: ``10.0.0.0/8``, ``example.com:443``, ``*.pypi.org:443/tcp``, ``[fd00::1]:80``,
            ``private``, ``host:5432``.

    Raises:
        ConfigError: It can't be understood.
    """
    subject, transport = _split_transport(text.strip())
    subject, ports = _split_ports(subject, text)
    subject = subject.removeprefix("[").removesuffix("]").lower().removesuffix(".")
    if subject in _NAMED:
        ranges = _NAMED[subject]
    elif (cidr := _cidr(subject)) is not None:
        ranges = (cidr,)
    elif _is_domain(subject):
        return (Rule(action=action, domain=subject, ports=ports, transport=transport),)
    else:
        message = f"{text!r} is not something that a rule can be about"
        raise ConfigError(message, hint=_HINT)
    return tuple(
        Rule(action=action, cidr=cidr, ports=ports, transport=transport) for cidr in ranges
    )


def _split_transport(text: str) -> tuple[str, Transport | None]:
    subject, slash, last = text.rpartition("/")
    if slash and last.lower() in _TRANSPORTS:
        return subject, cast("Transport", last.lower())
    return text, None


def _split_ports(subject: str, whole: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    if subject.count(":") > 1 and "]:" not in subject:
        return subject, ()
    front, colon, last = subject.rpartition(":")
    if not colon:
        return subject, ()
    found = []
    for part in last.split(","):
        match = _PORTS.fullmatch(part)
        if match is None:
            message = f"{last!r} in {whole!r} is not a port"
            raise ConfigError(message, hint=_HINT)
        first, end = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= end <= 65535:
            message = f"{part!r} in {whole!r} is not a range of ports from 1 to 65535"
            raise ConfigError(message)
        found.append((first, end))
    return front, tuple(found)


def _cidr(text: str) -> str | None:
    try:
        if "/" not in text:
            return str(ipaddress.ip_address(text))
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        return None


def _is_domain(text: str) -> bool:
    name = text.removeprefix("*.")
    labels = name.split(".")
    # All digits would be a mistyped address.
    plain = len(name) <= 253 and not labels[-1].isdigit()
    return plain and all(_LABEL.fullmatch(label) for label in labels)


def _rules(action: Action, given: tuple[str, ...] | list[str] | str) -> tuple[Rule, ...]:
    texts = (given,) if isinstance(given, str) else given
    return tuple(rule for text in texts for rule in parse_rule(action, text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Who a machine may reach. A deny rule wins, then an allow rule, then the default.

    >>> Policy(allow=("*.pypi.org:443",)).refuses_by_default
    True
    >>> Policy(deny=("private",)).refuses_by_default
    False

    Args:
        allow: What may be reached; see :func:`parse_rule`.
        deny: What may not.
        default: What becomes of the rest; ``deny`` when there are allow rules, else ``allow``.
        resolve_all: Names are resolved even if no rule allows them.

    Raises:
        ConfigError: A rule can't be understood.
    """

    allow: tuple[str, ...] | list[str] | str = ()
    deny: tuple[str, ...] | list[str] | str = ()
    default: Action | None = None
    resolve_all: bool = False
    rules: tuple[Rule, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Reads the rules."""
        rules = _rules("deny", self.deny) + _rules("allow", self.allow)
        object.__setattr__(self, "rules", rules)

    @property
    def refuses_by_default(self) -> bool:
        """Whether what no rule is about is refused."""
        if self.default is not None:
            return self.default == "deny"
        opening = [rule for rule in self.rules if rule.action == "allow" and not _opens(rule)]
        return bool(opening)

    @property
    def says_something(self) -> bool:
        """Whether it differs from letting everything through."""
        return bool(self.rules) or self.default is not None

    @property
    def about_names(self) -> bool:
        """Whether a rule is about a domain."""
        return any(rule.domain for rule in self.rules)

    def written(self) -> dict[str, object]:
        """Its parts as they were given, for a record."""

        def texts(given: tuple[str, ...] | list[str] | str) -> tuple[str, ...]:
            return (given,) if isinstance(given, str) else tuple(given)

        return {
            "allow": texts(self.allow),
            "deny": texts(self.deny),
            "default": self.default,
            "resolve_all": self.resolve_all,
        }

    def document(self) -> dict[str, object]:
        """As the gateway reads it."""
        return {
            "default": "deny" if self.refuses_by_default else "allow",
            "rules": [rule.document() for rule in self.rules],
            "resolve_all": self.resolve_all,
        }


def _opens(rule: Rule) -> bool:
    """Whether a rule only opens an address that is closed otherwise, and so says nothing of the rest."""
    closed = ("127.", "169.254.", "::1", "fe80:", "fd00:ec2:")
    return bool(rule.cidr) and rule.cidr.startswith(closed)

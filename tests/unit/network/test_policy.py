"""Rules as people write them."""

from __future__ import annotations

import pytest

from ringfence.errors import ConfigError
from ringfence.network import AttachOptions, Policy, PublishedPort, parse_rule


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("10.1.2.3", "allow 10.1.2.3"),
        ("10.1.2.3/8", "allow 10.0.0.0/8"),
        ("10.0.0.0/8:443", "allow 10.0.0.0/8:443"),
        ("10.0.0.0/8:80,443,8000-8100/tcp", "allow 10.0.0.0/8:80,443,8000-8100/tcp"),
        ("FD00::1", "allow fd00::1"),
        ("[fd00::1]:80/udp", "allow [fd00::1]:80/udp"),
        ("fd00::/8", "allow fd00::/8"),
        ("Example.COM.", "allow example.com"),
        ("*.pypi.org:443", "allow *.pypi.org:443"),
        ("_srv.example.com", "allow _srv.example.com"),
    ],
)
def test_rules_are_understood(text: str, written: str) -> None:
    (rule,) = parse_rule("allow", text)
    assert str(rule) == written


def test_named_ranges_are_several_rules() -> None:
    assert len(parse_rule("deny", "private")) == 5
    assert [rule.cidr for rule in parse_rule("allow", "host:22")] == ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "1.2.3",
        "1.2.3.4/33",
        "a..b",
        "-a.b",
        "a b",
        "x:0",
        "x:70000",
        "x:2-1",
        "x:y",
        "*.*",
    ],
)
def test_what_is_no_rule_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rule("allow", text)
    assert text in str(caught.value)


def test_allow_rules_close_the_rest_but_opening_rules_do_not() -> None:
    assert Policy(allow="example.com").refuses_by_default
    assert not Policy(deny="private").refuses_by_default
    assert not Policy(allow="host:5432").refuses_by_default
    assert not Policy(allow="example.com", default="allow").refuses_by_default
    document = Policy(allow=["a.b:1"], deny="1.2.3.4").document()
    assert document == {
        "default": "deny",
        "rules": [
            {"action": "deny", "cidr": "1.2.3.4"},
            {"action": "allow", "domain": "a.b", "ports": [[1, 1]]},
        ],
        "resolve_all": False,
    }


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("8080:80", "127.0.0.1:8080:80/tcp"),
        ("0.0.0.0:5353:53/udp", "0.0.0.0:5353:53/udp"),
        ("[::1]:0:22", "[::1]:0:22/tcp"),
    ],
)
def test_published_ports_are_understood(text: str, written: str) -> None:
    assert str(PublishedPort.parse(text)) == written


@pytest.mark.parametrize(
    "text", ["80", "80:", ":80", "x:80", "1:0", "1:2/sctp", "1.2.3:1:2", "1:70000"]
)
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"publish|address|port"):
        PublishedPort.parse(text)


def test_options_are_checked() -> None:
    for mac in ("02:00:00:00:00", "03:00:00:00:00:01", "x"):
        with pytest.raises(ConfigError, match="Ethernet"):
            AttachOptions(mac=mac)
    with pytest.raises(ConfigError, match="IP address"):
        AttachOptions(dns=("nowhere",))

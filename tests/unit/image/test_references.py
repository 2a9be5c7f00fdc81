from __future__ import annotations

import pytest

from ringfence.errors import ConfigError, FormatError
from ringfence.image import Digest, Platform, Reference

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("user/app", "docker.io/user/app:latest"),
        ("index.docker.io/user/app", "docker.io/user/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/a/b:v1.0_x", "localhost:5000/a/b:v1.0_x"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("ghcr.io/a/b-c__d.e", "ghcr.io/a/b-c__d.e:latest"),
        (f"debian@sha256:{HEX}", f"docker.io/library/debian@sha256:{HEX}"),
        (f"debian:12@sha256:{HEX}", f"docker.io/library/debian:12@sha256:{HEX}"),
    ],
)
def test_reference_means_what_it_means_to_docker(text: str, full: str) -> None:
    assert str(Reference.parse(text)) == full
    assert Reference.parse(full) == Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "Debian", "a//b", "a:", "a:b:c", "a@sha256:12", "a@", "-a", "a/-b", "host:port/a", "a b",
     "../a", "a:" + "t" * 129, "x/" + "a" * 300, "a\n"],
)  # fmt: skip
def test_reference_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        Reference.parse(text)


def test_familiar_form_drops_what_is_implied() -> None:
    assert Reference.parse("debian:12").familiar == "debian:12"
    assert Reference.parse("docker.io/u/a").familiar == "u/a:latest"
    assert Reference.parse("ghcr.io/u/a:1").familiar == "ghcr.io/u/a:1"


@pytest.mark.parametrize("text", ["sha256:" + "A" * 64, "md5:" + "a" * 32, "sha256:aa", HEX])
def test_digest_refuses(text: str) -> None:
    with pytest.raises(FormatError):
        Digest.parse(text)


def test_platform_choice() -> None:
    arm = Platform.parse("linux/arm/v7")
    assert arm.score(Platform.parse("linux/arm/v6")) > 0
    assert arm.score(Platform.parse("linux/arm/v8")) == 0
    assert arm.score(arm) > arm.score(Platform.parse("linux/arm/v6"))
    assert Platform.parse("arm64").score(Platform.parse("linux/arm64/v8")) == 100
    assert Platform.parse("x86_64").score(Platform.parse("linux/arm64")) == 0

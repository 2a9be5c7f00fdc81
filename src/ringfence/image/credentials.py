"""Credentials for registries: Docker's and Podman's files, and their credential helpers.

Source: Docker's config.json (auths, credsStore, credHelpers) and the protocol of
``docker-credential-*``; containers-auth.json(5).
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence import _paths
from ringfence.errors import ConfigError, FormatError
from ringfence.image import jsonio
from ringfence.image.references import DEFAULT_REGISTRY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ringfence.image.jsonio import Json, JsonObject

__all__ = ["Credentials", "find_credentials", "keep_credentials"]

_log = logging.getLogger(__name__)
_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_HELPER_TIMEOUT_S = 60.0
_HUB = "https://index.docker.io/v1/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A name and a password, or a token that stands for both.

    Args:
        username: The name; empty with a token.
        password: The password.
        identity_token: An OAuth 2 refresh token.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of the Authorization header."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


def find_credentials(registry: str, repository: str = "") -> Credentials | None:
    """What the user has for a registry, or for a repository of it.

    The first file that has some wins: ``$REGISTRY_AUTH_FILE``, Ringfence's own ``auth.json``,
    Podman's, Docker's.

    Raises:
        ConfigError: A file is malformed, or a helper failed.
    """
    for path in _files():
        try:
            data = path.read_bytes()
        except OSError:
            continue
        try:
            document = jsonio.load(data, str(path))
            found = _from_file(document, registry, repository, str(path))
        except FormatError as error:
            raise ConfigError(error.message, hint=f"mend or remove {path}") from error
        if found is not None:
            return found
    return None


def _files() -> Iterator[Path]:
    given = os.environ.get("REGISTRY_AUTH_FILE")
    if given:
        yield Path(given)
    yield _paths.config_dir() / "auth.json"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield Path(runtime) / "containers" / "auth.json"
    yield Path.home() / ".config" / "containers" / "auth.json"
    docker = os.environ.get("DOCKER_CONFIG")
    yield (Path(docker) if docker else Path.home() / ".docker") / "config.json"


def _keys(registry: str, repository: str) -> Iterator[str]:
    """Under which an entry may stand, the most particular first."""
    parts = repository.split("/") if repository else []
    for count in range(len(parts), 0, -1):
        yield f"{registry}/{'/'.join(parts[:count])}"
    yield registry
    if registry == DEFAULT_REGISTRY:
        yield from (_HUB, "index.docker.io", "registry-1.docker.io")


def _from_file(
    document: JsonObject,
    registry: str,
    repository: str,
    what: str,
) -> Credentials | None:
    helpers = jsonio.field_map(document, "credHelpers", what)
    auths = jsonio.field_map(document, "auths", what)
    store = jsonio.text(document, "credsStore", what, "")
    for key in _keys(registry, repository):
        helper = helpers.get(key)
        if isinstance(helper, str) and helper:
            return _ask(helper, key)
    plain = {re.sub(r"^https?://|/(?:v[12]/?)?$", "", key): key for key in auths}
    for key in _keys(registry, repository):
        name = key if key in auths else plain.get(key)
        if name is not None:
            entry = jsonio.field_map(auths, name, what)
            if store and not entry.get("auth"):
                return _ask(store, name)
            return _from_entry(entry, f"{what}: {name}")
    if store:
        return _ask(store, _HUB if registry == DEFAULT_REGISTRY else registry)
    return None


def _from_entry(entry: JsonObject, what: str) -> Credentials | None:
    token = jsonio.text(entry, "identitytoken", what, "")
    encoded = jsonio.text(entry, "auth", what, "")
    username = jsonio.text(entry, "username", what, "")
    password = jsonio.text(entry, "password", what, "")
    if encoded:
        try:
            decoded = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            msg = f"{what}: auth is not base64"
            raise FormatError(msg) from error
        username, _, password = decoded.partition(":")
        password = password.rstrip("\0")
    if not (token or username):
        return None
    return Credentials(username=username, password=password, identity_token=token)


def _ask(helper: str, key: str) -> Credentials | None:
    """Ask ``docker-credential-<helper>``."""
    if not _HELPER.fullmatch(helper):
        msg = f"{helper!r} is not the name of a credential helper"
        raise ConfigError(msg)
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=key.encode(),
            capture_output=True,
            timeout=_HELPER_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        msg = f"the credential helper {program} is configured, but not installed"
        raise ConfigError(msg, hint=f"install it, or take {helper!r} out of config.json") from error
    except subprocess.TimeoutExpired as error:
        msg = f"the credential helper {program} did not answer within {_HELPER_TIMEOUT_S:.0f} s"
        raise ConfigError(msg) from error
    if done.returncode != 0:
        said = (done.stdout or done.stderr).decode(errors="replace").strip()
        if "not found" in said.lower():
            return None
        msg = f"the credential helper {program} failed for {key}: {said[:300]}"
        raise ConfigError(msg)
    answer = jsonio.load(done.stdout, f"the answer of {program}")
    username = jsonio.text(answer, "Username", program, "")
    secret = jsonio.text(answer, "Secret", program, "")
    if username == "<token>":
        return Credentials(identity_token=secret)
    return Credentials(username=username, password=secret) if username else None


def keep_credentials(registry: str, username: str, password: str) -> Path:
    """Keep a name and a password in Ringfence's own ``auth.json``, readable by this user alone.

    Raises:
        ConfigError: The file there is malformed.
    """
    path = _paths.config_dir() / "auth.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    document: dict[str, Json] = {}
    if path.exists():
        try:
            document = dict(jsonio.load(path.read_bytes(), str(path)))
        except FormatError as error:
            raise ConfigError(error.message, hint=f"mend or remove {path}") from error
    auths = document.get("auths")
    encoded = base64.b64encode(f"{username}:{password}".encode()).decode()
    document["auths"] = {
        **(auths if isinstance(auths, dict) else {}),
        registry: {"auth": encoded},
    }
    work = path.with_name(".auth.json.part")
    work.unlink(missing_ok=True)
    work.touch(mode=0o600)
    work.write_bytes(jsonio.dump(document))
    work.rename(path)
    return path

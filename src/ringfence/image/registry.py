"""One registry: manifests and blobs by the OCI distribution specification 1.1.

Authentication is by challenge (RFC 9110 §11): Basic, or a Bearer token from the server that the
registry names, as the Docker token specification has it.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, urlencode, urljoin, urlsplit

from ringfence import _paths
from ringfence.errors import ConfigError, FormatError, HostError, NotFoundError, RingfenceError
from ringfence.image import jsonio
from ringfence.image.credentials import Credentials, find_credentials
from ringfence.image.http import HttpClient, Response
from ringfence.image.jsonio import MAX_DOCUMENT_BYTES
from ringfence.image.manifests import MediaType
from ringfence.image.references import DEFAULT_REGISTRY, Digest, Reference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Registry", "RegistrySettings"]

_log = logging.getLogger(__name__)

_ACCEPT = ", ".join(sorted(MediaType.INDEXES | MediaType.MANIFESTS))
_CHALLENGE = re.compile(r'([A-Za-z_]+)="((?:[^"\\]|\\.)*)"')
_TOKEN_SLACK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    """What ``registries.toml`` says of one registry.

    Args:
        mirrors: Base addresses to be asked first, in order.
        plain_http: Whether it is spoken to without encryption.
        ca_file: A further certificate authority.
    """

    mirrors: tuple[str, ...] = ()
    plain_http: bool = False
    ca_file: Path | None = None

    @classmethod
    def load(cls, registry: str, path: Path | None = None) -> RegistrySettings:
        """Read the table ``[registry."HOST"]``; all defaults where there is none.

        Raises:
            ConfigError: The file is malformed.
        """
        path = path if path is not None else _paths.config_dir() / "registries.toml"
        try:
            document = tomllib.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            msg = f"cannot read {path}: {error}"
            raise ConfigError(msg) from error
        try:
            table = jsonio.field_map(
                jsonio.field_map(document, "registry", str(path)),
                registry,
                str(path),
            )
            ca_file = jsonio.text(table, "ca_file", str(path), "")
            return cls(
                mirrors=tuple(jsonio.field_list(table, "mirrors", str(path))),
                plain_http=table.get("plain_http") is True,
                ca_file=Path(ca_file).expanduser() if ca_file else None,
            )
        except FormatError as error:
            raise ConfigError(error.message) from error


@dataclass(slots=True)
class _Grant:
    """What a challenge led to."""

    header: str
    expires: float = field(default=float("inf"))


class Registry:
    """A registry and its mirrors, for one repository; usable from several threads.

    Args:
        reference: Which repository.
        plain_http: Speak to it without encryption, whatever the settings say.
        actions: ``pull`` or ``pull,push``.
        also: Further repositories of it to read from (for mounting blobs).
    """

    def __init__(
        self,
        reference: Reference,
        *,
        plain_http: bool = False,
        actions: str = "pull",
        also: Sequence[str] = (),
    ) -> None:
        settings = RegistrySettings.load(reference.registry)
        self.reference = reference
        plain = plain_http or settings.plain_http
        host = (
            "registry-1.docker.io" if reference.registry == DEFAULT_REGISTRY else reference.registry
        )
        self.origin = f"{'http' if plain else 'https'}://{host}"
        self.mirrors = tuple(mirror.rstrip("/") for mirror in settings.mirrors)
        hosts = {host} if plain else set()
        hosts |= {urlsplit(m).netloc for m in self.mirrors if m.startswith("http://")}
        authorities = {host: settings.ca_file} if settings.ca_file is not None else {}
        self._http = HttpClient(frozenset(hosts), authorities)
        self._scopes = [f"repository:{reference.repository}:{actions}"]
        self._scopes += [f"repository:{name}:pull" for name in also]
        self._grants: dict[str, _Grant] = {}
        self._lock = threading.Lock()
        self._credentials: dict[str, Credentials | None] = {}

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # -- what there is --------------------------------------------------------------------------

    def manifest(self, selector: str) -> tuple[bytes, str, Digest]:
        """A manifest or index by tag or digest: its bytes, media type and digest.

        The mirrors are asked first; one that fails is passed over.

        Raises:
            NotFoundError: There is none.
            FormatError: Its digest isn't the one asked for.
        """
        for mirror in self.mirrors:
            try:
                return self._manifest(mirror, selector)
            except RingfenceError as error:
                _log.info("the mirror %s is passed over: %s", mirror, error)
        return self._manifest(self.origin, selector)

    def _manifest(self, place: str, selector: str) -> tuple[bytes, str, Digest]:
        path = f"/v2/{self.reference.repository}/manifests/{quote(selector, safe=':')}"
        with self._get(place + path, {"Accept": _ACCEPT}) as response:
            raw = _all(response)
            media_type = response.headers.get("content-type", "")
            announced = response.headers.get("docker-content-digest", "")
        wanted = selector if ":" in selector else announced
        digest = Digest.of(raw, wanted.partition(":")[0] if wanted else "sha256")
        if wanted and str(digest) != wanted:
            msg = f"{self.reference.name}: manifest {wanted} arrived as {digest}"
            raise FormatError(msg)
        return raw, media_type, digest

    def blob(self, digest: Digest, start: int = 0, *, direct: bool = False) -> Response:
        """A blob from byte `start` on; status 206 says that it begins there, 200 at 0.

        Args:
            digest: Its digest.
            start: Where it's to begin.
            direct: Ask no mirror.

        Raises:
            NotFoundError: There is none.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        path = f"/v2/{self.reference.repository}/blobs/{digest}"
        for mirror in () if direct else self.mirrors:
            try:
                return self._get(mirror + path, headers)
            except RingfenceError as error:
                _log.info("the mirror %s is passed over: %s", mirror, error)
        return self._get(self.origin + path, headers)

    def has_blob(self, digest: Digest) -> bool:
        """Whether the registry itself has it."""
        url = f"{self.origin}/v2/{self.reference.repository}/blobs/{digest}"
        with self._send("HEAD", url) as response:
            if response.status not in (200, 404):
                raise self._refusal(response, f"ask for blob {digest}")
            return response.status == 200

    # -- what is sent ---------------------------------------------------------------------------

    def mount(self, digest: Digest, source: str) -> str | None:
        """Take a blob over from another repository of the registry.

        Returns:
            None if that worked, else the address to upload it to.
        """
        return self._begin({"mount": str(digest), "from": source})

    def upload(self, digest: Digest, size: int, data: BinaryIO, location: str | None) -> None:
        """Send a blob.

        Args:
            digest: Its digest.
            size: Its length in bytes.
            data: It, from the start.
            location: Where to, if `mount` said so.

        Raises:
            HostError: The registry didn't take it.
        """
        where = location or self._begin({})
        if where is None:
            msg = f"{self.reference.registry} gave no address for an upload"
            raise HostError(msg)
        url = where + ("&" if urlsplit(where).query else "?") + urlencode({"digest": str(digest)})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._send("PUT", url, headers, data) as response:
            if response.status != 201:
                raise self._refusal(response, f"take blob {digest}")
            response.read()

    def put_manifest(self, selector: str, raw: bytes, media_type: str) -> None:
        """Send a manifest or index, under a tag or its digest.

        Raises:
            HostError: The registry didn't take it.
        """
        path = f"/v2/{self.reference.repository}/manifests/{quote(selector, safe=':')}"
        with self._send("PUT", self.origin + path, {"Content-Type": media_type}, raw) as response:
            if response.status not in (200, 201, 202):
                raise self._refusal(response, f"take manifest {selector}")
            response.read()

    def _begin(self, query: Mapping[str, str]) -> str | None:
        url = f"{self.origin}/v2/{self.reference.repository}/blobs/uploads/"
        if query:
            url += "?" + urlencode(query)
        with self._send("POST", url, {"Content-Length": "0"}, b"") as response:
            if response.status == 201 and query:
                response.read()
                return None
            location = response.headers.get("location", "")
            if response.status != 202 or not location:
                raise self._refusal(response, "begin an upload")
            response.read()
            return urljoin(url, location)

    # -- requests -------------------------------------------------------------------------------

    def _get(self, url: str, headers: Mapping[str, str]) -> Response:
        response = self._send("GET", url, headers)
        if response.status not in (200, 206):
            with response:
                raise self._refusal(response, f"give {url.rpartition('/')[2]}")
        return response

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | BinaryIO | None = None,
    ) -> Response:
        """Send with what an earlier challenge led to, and answer a new one once."""
        place = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"
        sent = self._grant(place)
        response = self._http.request(method, url, {**(headers or {}), **sent}, body)
        challenge = response.headers.get("www-authenticate", "")
        if response.status != 401 or not challenge:
            return response
        if body is not None and not isinstance(body, bytes):
            body.seek(0)
        response.read(MAX_DOCUMENT_BYTES)
        response.close()
        with self._lock:
            # Another thread may have answered the same challenge.
            if self._grant(place) == sent:
                self._grants[place] = self._answer(challenge, place)
        return self._http.request(method, url, {**(headers or {}), **self._grant(place)}, body)

    def _grant(self, place: str) -> dict[str, str]:
        grant = self._grants.get(place)
        if grant is None or grant.expires < time.monotonic():
            return {}
        return {"Authorization": grant.header}

    def _known(self, place: str) -> Credentials | None:
        """What the user has for a place. A mirror gets its own, never the registry's."""
        if place not in self._credentials:
            registry = self.reference.registry if place == self.origin else urlsplit(place).netloc
            self._credentials[place] = find_credentials(registry, self.reference.repository)
        return self._credentials[place]

    def _answer(self, challenge: str, place: str) -> _Grant:
        scheme, _, rest = challenge.partition(" ")
        own = self._known(place)
        name = self.reference.registry if place == self.origin else urlsplit(place).netloc
        if scheme.lower() == "basic":
            if own is None:
                msg = f"{name} wants a name and a password"
                raise ConfigError(msg, hint=f"ringfence image login {name}")
            return _Grant(own.basic)
        if scheme.lower() != "bearer":
            msg = f"{name} wants {scheme!r} authentication, which isn't known"
            raise ConfigError(msg)
        fields = dict(_CHALLENGE.findall(rest))
        return self._token(fields, own)

    def _token(self, fields: Mapping[str, str], own: Credentials | None) -> _Grant:
        realm = fields.get("realm", "")
        if self.origin.startswith("http://"):
            # Who trusts the way to the registry trusts the way to its token server.
            self._http.allow_plain(urlsplit(realm).netloc)
        query = [("service", fields["service"])] if fields.get("service") else []
        scopes = list(self._scopes)
        if fields.get("scope") and fields["scope"].split(":")[1:2] != scopes[0].split(":")[1:2]:
            scopes.append(fields["scope"])
        if own is not None and own.identity_token:
            form = [*query, ("grant_type", "refresh_token"), ("client_id", "ringfence")]
            form += [("refresh_token", own.identity_token), ("scope", " ".join(scopes))]
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            response = self._http.request("POST", realm, headers, urlencode(form).encode())
        else:
            query += [("scope", scope) for scope in scopes]
            basic = {"Authorization": own.basic} if own is not None else {}
            joint = "&" if urlsplit(realm).query else "?"
            response = self._http.request("GET", realm + joint + urlencode(query), basic)
        with response:
            if response.status != 200:
                raise self._refusal(response, "give a token")
            answer = jsonio.load(_all(response), "the token server's answer")
        token = jsonio.text(answer, "token", "token", "") or jsonio.text(
            answer,
            "access_token",
            "token",
            "",
        )
        if not token:
            msg = f"{urlsplit(realm).netloc} gave no token"
            raise HostError(msg)
        lasts_s = jsonio.integer(answer, "expires_in", "token", 60)
        return _Grant(f"Bearer {token}", time.monotonic() + max(lasts_s - _TOKEN_SLACK_S, 5.0))

    def _refusal(self, response: Response, what: str) -> ConfigError | NotFoundError | HostError:
        """The error for a status that says no, with the registry's own words."""
        name, status = self.reference.registry, response.status
        said = _said(response.text())
        words = f": {said}" if said else ""
        if status in (401, 403):
            msg = f"{name} refused to {what} ({status}){words}"
            hint = f"if the image exists: ringfence image login {name}"
            return ConfigError(msg, hint=hint)
        if status == 404:
            return NotFoundError(f"{name} has no {self.reference.repository} to {what}{words}")
        return HostError(f"{name} did not {what} (status {status}){words}")


def _all(response: Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := response.read(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_DOCUMENT_BYTES:
            msg = f"{response.url} is longer than {MAX_DOCUMENT_BYTES} bytes"
            raise FormatError(msg)
    return b"".join(parts)


def _said(body: str) -> str:
    """The message in a registry's error document."""
    try:
        errors = jsonio.objects(jsonio.load(body, "error"), "errors", "error")
    except FormatError:
        return body[:200] if body and not body.startswith("<") else ""
    return "; ".join(str(e.get("message") or e.get("code") or "") for e in errors)[:300]

"""HTTP/1.1 as registries need it, on the standard library: kept connections, proxies, redirects.

Source: RFC 9110, RFC 9112; proxies by the environment's ``HTTPS_PROXY``, ``HTTP_PROXY``,
``NO_PROXY``.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from ringfence.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["HttpClient", "Response"]

_TIMEOUT_S = 60.0
_REDIRECTS = 5
_ATTEMPTS = 4
_RETRY = frozenset({429, 500, 502, 503, 504})
_MAX_WAIT_S = 20.0
_BLOCK = 1 << 18
_AGENT = "ringfence"

_CERTS = (Path("/etc/docker/certs.d"), Path("/etc/containers/certs.d"))


@dataclass(slots=True)
class Response:
    """An answer whose body is still to be read; close it.

    Args:
        status: The status code.
        url: Where it came from in the end.
        headers: By lower-case name.
    """

    status: int
    url: str
    headers: Mapping[str, str]
    _raw: http.client.HTTPResponse
    _connection: _Kept
    _client: HttpClient = field(repr=False)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes of the body; none at its end.

        Raises:
            HostError: The connection broke, or the body is shorter than announced.
        """
        try:
            data = self._raw.read(size if size >= 0 else None)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise _network(self.url, error) from error
        if not data and size and self._raw.length:
            self._connection.close()
            msg = f"{_host(self.url)} closed the connection {self._raw.length} bytes too early"
            raise HostError(msg)
        return data

    def text(self, limit: int = 4096) -> str:
        """The start of the body, for messages."""
        return self.read(limit).decode(errors="replace").strip()

    def close(self) -> None:
        """Keep the connection if the body is read, else close it."""
        if self._raw.isclosed() and not self._raw.will_close:
            self._client.keep(self._connection)
        else:
            self._connection.close()
        self._raw.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


@dataclass(slots=True)
class _Kept:
    """A connection and what it is for."""

    key: tuple[str, str]
    raw: http.client.HTTPConnection
    used: bool = False

    def close(self) -> None:
        self.raw.close()


class HttpClient:
    """Connections to any number of servers, for any number of threads.

    Args:
        plain_hosts: Hosts (with port) that may be spoken to without encryption.
        ca_files: Further certificate authorities, by host.
    """

    def __init__(
        self,
        plain_hosts: frozenset[str] = frozenset(),
        ca_files: Mapping[str, Path] | None = None,
    ) -> None:
        self._plain = set(plain_hosts)
        self._cas = dict(ca_files or {})
        self._idle: dict[tuple[str, str], list[_Kept]] = {}
        self._lock = threading.Lock()

    def allow_plain(self, host: str) -> None:
        """Let this host, with its port, be spoken to without encryption."""
        self._plain.add(host)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            for kept in self._idle.values():
                for connection in kept:
                    connection.close()
            self._idle.clear()

    def keep(self, connection: _Kept) -> None:
        """Take a connection back."""
        connection.used = True
        with self._lock:
            self._idle.setdefault(connection.key, []).append(connection)

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | BinaryIO | None = None,
    ) -> Response:
        """Send a request; GET and HEAD are tried again when the network or the server fails.

        Redirects are followed for GET and HEAD; credentials don't follow to another host.

        Raises:
            HostError: No answer.
            ConfigError: The address isn't one, or is unencrypted without leave.
        """
        again = method in ("GET", "HEAD")
        wait_s = 0.3
        for attempt in range(1, _ATTEMPTS + 1):
            last = attempt == _ATTEMPTS or not again
            try:
                response = self._follow(method, url, dict(headers or {}), body)
            except HostError as error:
                # Nobody listens, or it isn't TLS: that doesn't pass within seconds.
                if last or isinstance(error.__cause__, (ConnectionRefusedError, ssl.SSLError)):
                    raise
            else:
                if response.status not in _RETRY or last:
                    return response
                wait_s = max(wait_s, _retry_after(response.headers))
                response.read(_BLOCK)
                response.close()
            time.sleep(min(wait_s, _MAX_WAIT_S))
            wait_s *= 2
        msg = f"{url}: no attempt was made"
        raise HostError(msg)

    def _follow(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | BinaryIO | None,
    ) -> Response:
        for _ in range(_REDIRECTS + 1):
            response = self._once(method, url, headers, body)
            target = response.headers.get("location")
            if method not in ("GET", "HEAD") or not 301 <= response.status <= 308 or not target:
                return response
            response.read(_BLOCK)
            response.close()
            there = urljoin(url, target)
            if _host(there) != _host(url) or urlsplit(there).scheme != urlsplit(url).scheme:
                headers.pop("Authorization", None)
            if urlsplit(url).scheme == "https" and urlsplit(there).scheme != "https":
                msg = f"{_host(url)} redirects to an unencrypted address on {_host(there)}"
                raise ConfigError(msg)
            url = there
        msg = f"{_host(url)} redirects in circles"
        raise HostError(msg)

    def _once(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | BinaryIO | None,
    ) -> Response:
        parts = urlsplit(url)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        fresh = False
        while True:
            connection = self._connect(parts, fresh=fresh)
            if connection.key[1].startswith("http-proxy:"):
                path = url
            try:
                connection.raw.request(method, path, body, {"User-Agent": _AGENT, **headers})
                raw = connection.raw.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A kept connection may have been closed by the server meanwhile.
                if connection.used and not fresh and not hasattr(body, "read"):
                    fresh = True
                    continue
                raise _network(url, error) from error
            found = {key.lower(): value for key, value in raw.getheaders()}
            return Response(raw.status, url, found, raw, connection, self)

    def _connect(self, parts: SplitResult, *, fresh: bool) -> _Kept:
        host = parts.netloc.rpartition("@")[2]
        if parts.scheme not in ("http", "https") or not parts.hostname:
            msg = f"not an address to fetch from: {parts.geturl()!r}"
            raise ConfigError(msg)
        if parts.scheme == "http" and host not in self._plain:
            msg = f"{host} is reached without encryption"
            raise ConfigError(msg, hint="allow it with --plain-http, if the network is trusted")
        proxy = _proxy(parts.scheme, host)
        key = (f"{parts.scheme}://{host}", f"{parts.scheme}-proxy:{proxy}" if proxy else "")
        if not fresh:
            with self._lock:
                idle = self._idle.get(key)
                if idle:
                    return idle.pop()
        return _Kept(key, self._open(parts, host, proxy))

    def _open(self, parts: SplitResult, host: str, proxy: str) -> http.client.HTTPConnection:
        name, port = parts.hostname or "", parts.port
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else None
        via = (target.hostname or "", target.port or 3128) if target is not None else None
        if parts.scheme == "http":
            where, at = via or (name, port or 80)
            return http.client.HTTPConnection(where, at, timeout=_TIMEOUT_S, blocksize=_BLOCK)
        context = self._context(host)
        where, at = via or (name, port or 443)
        connection = http.client.HTTPSConnection(
            where,
            at,
            timeout=_TIMEOUT_S,
            blocksize=_BLOCK,
            context=context,
        )
        if target is not None:
            headers = {}
            if target.username:
                pair = f"{unquote(target.username)}:{unquote(target.password or '')}"
                encoded = base64.b64encode(pair.encode()).decode()
                headers["Proxy-Authorization"] = f"Basic {encoded}"
            connection.set_tunnel(name, port or 443, headers)
        return connection

    def _context(self, host: str) -> ssl.SSLContext:
        context = ssl.create_default_context()
        own = self._cas.get(host)
        if own is not None:
            context.load_verify_locations(own)
        for folder in _CERTS:
            try:
                for path in sorted((folder / host).glob("*.crt")):
                    context.load_verify_locations(path)
            except OSError:
                continue
        return context


def _proxy(scheme: str, host: str) -> str:
    proxies = urllib.request.getproxies_environment()
    if scheme not in proxies or urllib.request.proxy_bypass(host):
        return ""
    return proxies[scheme]


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "")
    return float(text) if text.isdigit() else 0.0


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _network(url: str, error: Exception) -> HostError:
    """The error for a failed exchange, with what may help."""
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    hint = ""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = f"put the registry's authority into /etc/docker/certs.d/{_host(url)}/ca.crt"
    elif isinstance(error, ssl.SSLError):
        hint = "if the registry speaks unencrypted HTTP: --plain-http"
    number = error.errno if isinstance(error, OSError) else None
    return HostError(f"cannot reach {_host(url)}: {why}", hint=hint, errno=number)

"""A registry that breaks off, redirects, lies, and asks for tokens."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

from ringfence.errors import ConfigError, FormatError, HostError
from ringfence.image.manifests import Descriptor, Manifest, MediaType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ringfence.image import Store

CONFIG = (
    b'{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[]}}'
)


@dataclass
class Script:
    """What the registry has, and how it behaves."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifest: bytes = b""
    token: str = ""
    cut_after: int = 0
    cuts: int = 0
    ignore_ranges: bool = False
    redirect_to: str = ""
    challenge: str = ""
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the class's own name
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        script = self.script
        with script.lock:
            script.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        parts = urlsplit(self.path)
        if parts.path == "/token":
            query = parse_qs(parts.query)
            assert query["scope"] == ["repository:app:pull"]
            token = base64.b64encode(json.dumps(query["service"]).encode()).decode()
            self.answer(200, json.dumps({"token": token, "expires_in": 300}).encode())
        elif script.challenge and "Authorization" not in self.headers:
            self.answer(401, b"{}", WWW_Authenticate=script.challenge)
        elif parts.path.startswith("/v2/app/manifests/"):
            self.answer(200, script.manifest, Content_Type=MediaType.OCI_MANIFEST)
        elif script.redirect_to and parts.path.startswith("/v2/"):
            self.answer(307, b"", Location=script.redirect_to + parts.path)
        elif (name := parts.path.rpartition("/")[2]) in script.blobs:
            self.blob(script.blobs[name])
        else:
            self.answer(404, b"{}")

    def blob(self, data: bytes) -> None:
        script = self.script
        asked = self.headers.get("Range", "")
        start = int(asked[6:-1]) if asked and not script.ignore_ranges else 0
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with script.lock:
            cut = script.cuts > 0 and len(body) > script.cut_after
            script.cuts -= cut
        self.wfile.write(body[: script.cut_after] if cut else body)
        self.close_connection = cut


@dataclass
class Server:
    script: Script
    host: str

    def serve(self, layer: bytes) -> None:
        """Offer an image of one layer that is no tar: pulling doesn't look inside."""
        blobs = [
            Descriptor.of(CONFIG, MediaType.OCI_CONFIG),
            Descriptor.of(layer, MediaType.OCI_LAYER),
        ]
        self.script.blobs = {str(b.digest): d for b, d in zip(blobs, (CONFIG, layer), strict=True)}
        self.script.manifest = Manifest.build(blobs[0], (blobs[1],)).raw


@pytest.fixture
def start() -> Iterator[Callable[[], Server]]:
    running: list[http.server.ThreadingHTTPServer] = []

    def begin() -> Server:
        script = Script()
        handler = type("Bound", (Handler,), {"script": script})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Server(script, f"127.0.0.1:{server.server_address[1]}")

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


LAYER = hashlib.shake_128(b"layer").digest(1_000_000)


def ranges(server: Server) -> list[str]:
    return [headers["range"] for _, headers in server.script.seen if "range" in headers]


def test_download_goes_on_where_it_broke(store: Store, start: Callable[[], Server]) -> None:
    server = start()
    server.serve(LAYER)
    server.script.cuts, server.script.cut_after = 3, 200_000
    image = store.pull(f"{server.host}/app", plain_http=True)
    assert store.blobs.path(image.manifest.layers[0].digest).read_bytes() == LAYER
    assert ranges(server) == ["bytes=200000-", "bytes=400000-", "bytes=600000-"]


def test_server_without_ranges_starts_over(store: Store, start: Callable[[], Server]) -> None:
    server = start()
    server.serve(LAYER)
    server.script.cuts, server.script.cut_after = 1, 200_000
    server.script.ignore_ranges = True
    image = store.pull(f"{server.host}/app", plain_http=True)
    assert store.blobs.path(image.manifest.layers[0].digest).read_bytes() == LAYER


def test_next_pull_goes_on_too(store: Store, start: Callable[[], Server]) -> None:
    server = start()
    server.serve(LAYER)
    server.script.cuts, server.script.cut_after = 10_000, 50_000
    server.script.ignore_ranges = True
    server.script.blobs[next(iter(server.script.blobs))] = CONFIG
    with pytest.raises(HostError):
        # Without ranges no attempt gets further than the one before.
        store.pull(f"{server.host}/app", plain_http=True)
    server.script.cuts, server.script.ignore_ranges = 0, False
    store.pull(f"{server.host}/app", plain_http=True)
    assert ranges(server)[-1] == "bytes=50000-"


def test_longer_than_promised_is_refused(store: Store, start: Callable[[], Server]) -> None:
    server = start()
    server.serve(LAYER)
    for digest, data in server.script.blobs.items():
        server.script.blobs[digest] = data + b"more"
    with pytest.raises(FormatError, match="longer than its manifest says"):
        store.pull(f"{server.host}/app", plain_http=True)


def test_manifest_by_digest_must_have_it(store: Store, start: Callable[[], Server]) -> None:
    server = start()
    server.serve(LAYER)
    with pytest.raises(FormatError, match="arrived as"):
        store.pull(f"{server.host}/app@sha256:{'0' * 64}", plain_http=True)


def test_token(store: Store, start: Callable[[], Server]) -> None:
    server = start()
    server.serve(LAYER)
    realm = f"http://{server.host}/token"
    server.script.challenge = f'Bearer realm="{realm}",service="s v",scope="repository:app:pull"'
    store.pull(f"{server.host}/app", plain_http=True)
    asked = [path for path, _ in server.script.seen if path.startswith("/token")]
    assert len(asked) == 1
    tokens = {headers.get("authorization") for _, headers in server.script.seen[2:]}
    assert tokens == {"Bearer " + base64.b64encode(b'["s v"]').decode()}


def test_credentials_stay_when_redirected(
    store: Store,
    home: Path,
    start: Callable[[], Server],
) -> None:
    origin, elsewhere = start(), start()
    origin.serve(LAYER)
    elsewhere.script.blobs = origin.script.blobs
    origin.script.challenge = 'Basic realm="x"'
    origin.script.redirect_to = f"http://{elsewhere.host}"
    (home / ".docker").mkdir()
    auth = base64.b64encode(b"user:secret").decode()
    (home / ".docker/config.json").write_text(
        json.dumps({"auths": {origin.host: {"auth": auth}}}),
    )
    # Blobs lie on a host that nobody has allowed to be unencrypted.
    with pytest.raises(ConfigError, match="without encryption"):
        store.pull(f"{origin.host}/app", plain_http=True)
    settings = Path(str(home)).parent / "rf/config/registries.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        f'[registry."{origin.host}"]\nplain_http = true\nmirrors = ["http://{elsewhere.host}/none"]\n',
    )
    store.pull(f"{origin.host}/app")
    assert not [headers for _, headers in elsewhere.script.seen if "authorization" in headers]


def mirrored(home: Path, origin: Server, mirror: Server) -> None:
    settings = Path(str(home)).parent / "rf/config/registries.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        f'[registry."{origin.host}"]\nplain_http = true\nmirrors = ["http://{mirror.host}"]\n',
    )


def test_mirror_that_wants_a_password_is_passed_over(
    store: Store, home: Path, start: Callable[[], Server]
) -> None:
    origin, mirror = start(), start()
    origin.serve(LAYER)
    mirror.script.challenge = 'Basic realm="x"'
    mirrored(home, origin, mirror)

    image = store.pull(f"{origin.host}/app")

    assert store.blobs.path(image.manifest.layers[0].digest).read_bytes() == LAYER
    assert mirror.script.seen


def test_mirror_gets_its_own_password_and_not_the_registrys(
    store: Store, home: Path, start: Callable[[], Server]
) -> None:
    origin, mirror = start(), start()
    mirror.serve(LAYER)
    mirror.script.challenge = 'Basic realm="x"'
    (home / ".docker").mkdir()
    words = {server: base64.b64encode(f"{name}:secret".encode()).decode()
             for server, name in ((origin.host, "origin"), (mirror.host, "mirror"))}  # fmt: skip
    (home / ".docker/config.json").write_text(
        json.dumps({"auths": {host: {"auth": word} for host, word in words.items()}}),
    )
    mirrored(home, origin, mirror)

    store.pull(f"{origin.host}/app")

    sent = {headers.get("authorization") for _, headers in mirror.script.seen}
    assert sent == {None, f"Basic {words[mirror.host]}"}
    assert origin.script.seen == []


def test_mirror_with_wrong_bytes_is_passed_over(
    store: Store, home: Path, start: Callable[[], Server]
) -> None:
    origin, mirror = start(), start()
    origin.serve(LAYER)
    mirror.serve(LAYER)
    wrong = bytearray(LAYER)
    wrong[5] ^= 1
    mirror.script.blobs = {
        name: bytes(wrong) if data == LAYER else data for name, data in mirror.script.blobs.items()
    }
    mirrored(home, origin, mirror)

    image = store.pull(f"{origin.host}/app")

    assert store.blobs.path(image.manifest.layers[0].digest).read_bytes() == LAYER
    assert len([path for path, _ in mirror.script.seen if "/blobs/" in path]) == 2

"""Run as a program: a host on the network that tests reach, with services on well-known ports.

| port | service |
|---|---|
| TCP 7, UDP 7 | echo |
| TCP 9 | counts what comes until the other side has said all, then says how much it was |
| TCP 19 | reads a number and a newline, sends that many bytes |
| TCP 25 | speaks first, then echoes |
| TCP 80 | HTTP; says who asked |
| TCP 81 | resets each connection |
| TCP 443 | answers the first bytes, whatever they are |
| TCP 53, UDP 53 | names: all below ``example`` are here |
"""

from __future__ import annotations

import socket
import socketserver
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_CHUNK = bytes(range(256)) * 256


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class _Greet(_Echo):
    def handle(self) -> None:
        self.request.sendall(b"welcome")
        super().handle()


class _Count(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        total = 0
        while data := self.request.recv(1 << 20):
            total += len(data)
        self.request.sendall(b"%d" % total)


class _Source(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        left = int(self.rfile.readline())
        while left:
            part = _CHUNK[: min(left, len(_CHUNK))]
            self.wfile.write(part)
            left -= len(part)


class _Reset(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()


class _First(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        if self.request.recv(65536):
            self.request.sendall(b"heard")


class _Web(BaseHTTPRequestHandler):
    # Head and body in one piece.
    wbufsize = -1

    def do_GET(self) -> None:
        body = f"{self.client_address[0]} {self.headers.get('Host')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _answer(query: bytes, own: tuple[str, str], *, by_tcp: bool) -> bytes:
    end = query.index(b"\0", 12) + 5
    kind = query[end - 4 : end - 2]
    name = query[12 : end - 5].lower()
    records = b""
    flags = b"\x81\x80"
    if name.startswith(b"\x02nx"):
        flags = b"\x81\x83"
    elif name.startswith(b"\x03big") and not by_tcp:
        flags = b"\x83\x80"
    elif kind == b"\0\x01":
        address = "127.0.0.1" if name.startswith(b"\x06rebind") else own[0]
        records = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + socket.inet_pton(
            socket.AF_INET, address
        )
    elif kind == b"\0\x1c":
        records = b"\xc0\x0c\0\x1c\0\x01\0\0\0\x3c\0\x10" + socket.inet_pton(
            socket.AF_INET6, own[1]
        )
    count = b"\0\x01" if records else b"\0\0"
    return query[:2] + flags + b"\0\x01" + count + b"\0\0\0\0" + query[12:end] + records


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    address_family: int = socket.AF_INET6
    request_queue_size = 4096

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a thread that writes to a full pipe never ends."""


class _Web6(ThreadingHTTPServer):
    address_family: int = socket.AF_INET6
    daemon_threads = True


def _datagrams(port: int, reply: object) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as bound:
        bound.bind(("::", port))
        while True:
            data, peer = bound.recvfrom(65536)
            bound.sendto(reply(data), peer)  # type: ignore[operator]


def main() -> None:
    own = (sys.argv[1], sys.argv[2])

    class Names(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while head := self.request.recv(2):
                query = self.request.recv(int.from_bytes(head, "big"))
                answer = _answer(query, own, by_tcp=True)
                self.request.sendall(len(answer).to_bytes(2, "big") + answer)

    handlers = {7: _Echo, 9: _Count, 19: _Source, 25: _Greet, 81: _Reset, 443: _First, 53: Names}
    servers: list[socketserver.TCPServer] = [
        _Server(("::", port), handler) for port, handler in handlers.items()
    ]
    servers.append(_Web6(("::", 80), _Web))
    jobs = [threading.Thread(target=server.serve_forever) for server in servers]
    replies = {7: lambda data: data, 53: lambda data: _answer(data, own, by_tcp=False)}
    jobs += [threading.Thread(target=_datagrams, args=item) for item in replies.items()]
    for job in jobs:
        job.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""A host that breaks the agent's protocol, and a guest that breaks the client's."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import AgentError, GuestError, GuestTimeout, RingfenceError
from ringfence.guest.agent import Agent
from ringfence.guest.frames import Kind
from ringfence.guest.spec import ExecSpec
from tests.unit.guest.test_agent import wait_until_gone

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.guest.conftest import Hosted


def frame(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IB", len(payload), kind) + payload


def request(**fields: object) -> bytes:
    return frame(Kind.REQUEST, json.dumps(fields).encode())


def read_frame(sock: socket.socket) -> tuple[int, bytes]:
    head = sock.recv(5, socket.MSG_WAITALL)
    length, kind = struct.unpack("<IB", head)
    return kind, sock.recv(length, socket.MSG_WAITALL) if length else b""


SLEEP = request(op="exec", argv=["sleep", "100"], stdin=True)


@pytest.mark.parametrize(
    "stream",
    [
        b"\xff" * 100,
        frame(99),
        struct.pack("<IB", (1 << 20) + 1, Kind.REQUEST),
        frame(Kind.SETUP, b"{}"),
        frame(Kind.ANSWER, b"{}"),
        SLEEP + frame(Kind.REQUEST, b"{}"),
        SLEEP + frame(Kind.SIGNAL, b"xx"),
        # The command's pipe takes 256 KiB, and as much may wait.
        SLEEP + frame(Kind.STDIN, bytes(200_000)) * 4,
        request(op="tar_in", path="/tmp/ringfence-test-tar") + frame(Kind.STDOUT, b"x"),
    ],
    ids=[
        *("ones", "no kind", "too long", "setup again", "answer"),
        *("request to a command", "short signal", "too much input", "wrong frame in a tar"),
    ],
)
def test_a_host_that_breaks_the_protocol_loses_its_connection_alone(
    hosted: Hosted, stream: bytes
) -> None:
    with hosted.connect() as sock:
        sock.settimeout(10)
        # An end with input that wasn't taken is a reset.
        with contextlib.suppress(ConnectionError):
            sock.sendall(stream)
            while sock.recv(1 << 16):
                pass
    hosted.agent.ping()


@pytest.mark.parametrize(
    "payload",
    [b"", b"nonsense", b"[]", b'{"op":"fly"}', b'{"op":"stat"}', b"[" * 5000],
    ids=["empty", "text", "list", "unknown", "no path", "deep"],
)
def test_a_wrong_request_is_answered_and_the_connection_goes_on(
    hosted: Hosted, payload: bytes
) -> None:
    with hosted.connect() as sock:
        sock.settimeout(10)
        sock.sendall(frame(Kind.REQUEST, payload) + request(op="ping"))
        kind, answer = read_frame(sock)
        assert kind == Kind.ERROR
        assert json.loads(answer)["kind"] == "config"
        assert read_frame(sock) == (Kind.ANSWER, b"{}")


def test_frames_of_a_command_that_has_ended_are_let_pass(hosted: Hosted) -> None:
    with hosted.connect() as sock:
        sock.settimeout(10)
        sock.sendall(request(op="exec", argv=["true"], stdin=True))
        while read_frame(sock)[0] != Kind.EXIT:
            pass
        late = frame(Kind.STDIN, b"late") + frame(Kind.SIGNAL, bytes([15, 0, 0, 0]))
        sock.sendall(late + frame(Kind.CREDIT, bytes(5)) + request(op="ping"))
        assert read_frame(sock) == (Kind.ANSWER, b"{}")


def test_a_host_that_reads_nothing_is_let_go_when_it_closes(hosted: Hosted) -> None:
    sock = hosted.connect()
    with sock:
        sock.settimeout(10)
        sock.sendall(request(op="exec", argv=["yes"], stdin=False))
        kind, answer = read_frame(sock)
        assert kind == Kind.ANSWER
        pid = json.loads(answer)["pid"]
        time.sleep(0.1)
        hosted.agent.ping()
    wait_until_gone(pid)


def test_too_many_connections_are_refused_and_others_served_later(hosted: Hosted) -> None:
    socks = [hosted.connect() for _ in range(300)]
    try:
        refused = 0
        for sock in socks[256:]:
            sock.settimeout(10)
            refused += sock.recv(1) == b""
        assert refused >= 40
    finally:
        for sock in socks:
            sock.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            hosted.agent.ping()
            break
        except AgentError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# The other way round: a guest that was taken over.


def guest(*answers: bytes) -> Agent:
    """A guest that says these things to whoever connects, whatever is asked."""

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=answer, args=(theirs,)).start()
        return ours

    def answer(sock: socket.socket) -> None:
        with sock:
            for data in answers:
                try:
                    sock.sendall(data)
                except OSError:
                    return
            sock.settimeout(10)
            try:
                while sock.recv(1 << 16):
                    pass
            except OSError:
                return

    return Agent.attach(connect)


def exec_whole(agent: Agent) -> tuple[bytes, bytes]:
    with agent.exec(ExecSpec(argv=("x",))) as process:
        return process.communicate(timeout_s=5)


@pytest.mark.parametrize(
    "answers",
    [
        (b"\xff" * 100,),
        (frame(Kind.HELLO, b"{}"),),
        (frame(Kind.ANSWER, b"nonsense"),),
        (frame(Kind.ANSWER, b"[]"),),
        (frame(Kind.EXIT, b"[" * 100_000),),
        (frame(Kind.STDOUT, bytes(200_000)), frame(Kind.STDOUT, bytes(1 << 19))),
        (frame(Kind.DATA, b"x"),),
    ],
    ids=["ones", "hello", "text", "list", "deep", "too much output", "data"],
)
def test_a_guest_that_breaks_the_protocol_is_refused(answers: tuple[bytes, ...]) -> None:
    with pytest.raises(AgentError):
        exec_whole(guest(*answers))


def test_odd_exits_are_exit_codes_all_the_same() -> None:
    for payload, code in {b"{}": 255, b'{"code":300}': 44, b'{"signal":"x"}': 255}.items():
        with guest(frame(Kind.EXIT, payload)).exec(ExecSpec(argv=("x",))) as process:
            assert process.wait(5) == code


@pytest.mark.parametrize(
    "call",
    [
        lambda agent: agent.stats(),
        lambda agent: agent.files.stat("/x"),
        lambda agent: agent.files.list("/x"),
        lambda agent: agent.files.write("/x", b"y"),
        lambda agent: agent.sync_time(),
    ],
    ids=["stats", "stat", "list", "write", "time"],
)
def test_answers_without_what_belongs_in_them_are_refused(
    call: Callable[[Agent], object],
) -> None:
    with pytest.raises(AgentError, match=r"broke the protocol|doesn't end"):
        call(guest(frame(Kind.ANSWER, b"{}") * 2))


def test_a_directory_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.guest.files._MAX_ENTRIES", 100)
    answer = json.dumps({"entries": [], "count": 10, "more": True}).encode()
    with pytest.raises(AgentError, match="doesn't end"):
        guest(frame(Kind.ANSWER, answer)).files.list("/x")


def test_a_refusal_is_the_guests_words() -> None:
    error = json.dumps({"kind": "guest", "message": "no such thing", "errno": 2}).encode()
    with pytest.raises(GuestError, match="no such thing"):
        guest(frame(Kind.ERROR, error)).stats()


def random_stream(chance: random.Random) -> bytes:
    """Frames of any kind and words that are nearly right, now and then bytes that are no frame."""
    words = [b"{}", b'{"pid":1}', b'{"code":0}', b'{"signal":9,"timed_out":1}', b'{"code":[]}', b""]
    stream = b""
    for _ in range(chance.randrange(12)):
        payload = bytearray(chance.choice([*words, chance.randbytes(chance.randrange(9))]))
        if payload and chance.random() < 0.3:
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        kind = chance.choice([*Kind, 17, 18, 19, 22, chance.randrange(256)])
        stream += frame(kind, bytes(payload))
    return stream if chance.random() < 0.8 else stream + chance.randbytes(20)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_guest_sends_ends_in_an_answer_or_an_error_of_ours(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(400):
        ours, theirs = socket.socketpair()
        theirs.sendall(random_stream(chance))
        theirs.shutdown(socket.SHUT_WR)
        agent = Agent.attach(lambda ours=ours: ours)  # type: ignore[misc]
        with theirs:
            try:
                if chance.random() < 0.5:
                    exec_whole(agent)
                else:
                    agent.files.stat("/x")
            except RingfenceError:
                pass


def accept(*messages: tuple[bytes, bool]) -> Agent:
    """What Agent.accept makes of a VM process that hands out these messages."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            for data, with_connection in messages:
                one, other = socket.socketpair()
                with one, other:
                    one.sendall(frame(Kind.HELLO, b'{"version":2}'))
                    socket.send_fds(theirs, [data], [other.fileno()] if with_connection else [])
        return Agent.accept(ours, socket.socket, timeout_s=0.5)


def test_only_connections_to_the_agents_port_are_the_agents() -> None:
    other = struct.pack("<II", 1025, 7)
    with pytest.raises(AgentError, match="VM process ended"):
        accept((other, True), (b"xx", True), (struct.pack("<II", 1024, 7), False))


def test_an_agent_of_another_version_is_refused() -> None:
    with pytest.raises(AgentError, match="version 2"):
        accept((struct.pack("<II", 1024, 7), True))


def test_a_guest_that_does_not_come_up_is_given_up() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, pytest.raises(GuestTimeout, match="didn't come up"):
        Agent.accept(ours, socket.socket, timeout_s=0.05)

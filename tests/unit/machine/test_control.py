"""Both control sockets: the VM process's, and a machine's own."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from ringfence.errors import ConfigError, InternalError, NotFoundError, StateError
from ringfence.machine import control_server
from ringfence.machine.control import Control

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def ends() -> Iterator[tuple[Control, socket.socket]]:
    ours, theirs = socket.socketpair()
    control = Control(ours)
    with theirs:
        yield control, theirs
    control.close()


def answer_with(theirs: socket.socket, *messages: object) -> None:
    """Reads one request in a thread, then sends these."""

    def answer() -> None:
        theirs.recv(4096)
        for message in messages:
            theirs.sendall(json.dumps(message).encode() + b"\n")

    threading.Thread(target=answer, daemon=True).start()


def test_an_answer_is_found_among_events(ends: tuple[Control, socket.socket]) -> None:
    control, theirs = ends
    answer_with(
        theirs, {"event": "crash-kernel"}, {"id": 9, "result": {}}, {"id": 1, "result": {"a": 2}}
    )
    assert control.call("stats") == {"a": 2}
    assert control.wait_event("crash-kernel", timeout_s=0) == {"event": "crash-kernel"}


def test_an_error_is_of_its_class(ends: tuple[Control, socket.socket]) -> None:
    control, theirs = ends
    answer_with(theirs, {"id": 1, "error": {"kind": "config", "message": "no such thing"}})
    with pytest.raises(ConfigError, match="no such thing"):
        control.call("balloon")


def test_the_end_wakes_everybody(ends: tuple[Control, socket.socket]) -> None:
    control, theirs = ends
    threading.Timer(0.05, lambda: theirs.shutdown(socket.SHUT_RDWR)).start()
    assert control.wait_event("exit", timeout_s=10) is None
    assert control.ended
    with pytest.raises(StateError, match="ended"):
        control.call("pause")


def test_an_event_that_does_not_come(ends: tuple[Control, socket.socket]) -> None:
    assert ends[0].wait_event("ready", timeout_s=0.01) is None


def test_garbage_is_skipped(ends: tuple[Control, socket.socket]) -> None:
    control, theirs = ends
    theirs.sendall(b'[1, 2]\n{"event": "ready"}\n')
    assert control.wait_event("ready", timeout_s=5) == {"event": "ready"}


def test_a_machine_answers_other_processes(tmp_path: Path) -> None:
    def refuse(_request: dict[str, object]) -> dict[str, object]:
        message = "nothing there"
        raise NotFoundError(message, hint="look elsewhere")

    def fail(_request: dict[str, object]) -> dict[str, object]:
        message = "slip"
        raise ValueError(message)

    methods = {"echo": lambda request: {"got": request["x"]}, "refuse": refuse, "fail": fail}
    # Longer than a socket's address may be.
    path = tmp_path / ("d" * 120) / "control"
    server = control_server.ControlServer(path, methods)
    try:
        assert control_server.call(path, "echo", x=3) == {"got": 3}
        with pytest.raises(NotFoundError, match="nothing there") as error:
            control_server.call(path, "refuse")
        assert error.value.hint == "look elsewhere"
        with pytest.raises(InternalError, match="ValueError: slip"):
            control_server.call(path, "fail")
        with pytest.raises(InternalError, match="doesn't know"):
            control_server.call(path, "what")
    finally:
        server.close()
    with pytest.raises(StateError, match="not running"):
        control_server.call(path, "echo", x=3)

"""Machines' ends of networks, played by network namespaces."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from ringfence.network import AttachOptions, attach
from tests.framework.networks import Namespace, Peer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.network import Attachment

_NUMBERS = itertools.count()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def peer() -> Iterator[Peer]:
    with Peer() as outside:
        yield outside


class Guest(Namespace):
    """A container's namespace on a network."""

    def __init__(self, network: str, options: AttachOptions, name: str) -> None:
        super().__init__()
        self.id = name
        with ExitStack() as stack:
            stack.callback(super().close)
            self.attachment: Attachment = stack.enter_context(
                attach(network, name, "container", options)
            )
            self.attachment.enter(self.pid)
            stack.pop_all()

    def close(self) -> None:
        self.attachment.close()
        super().close()


class MakeGuest(Protocol):
    def __call__(self, network: str = "user", **options: object) -> Guest: ...


@pytest.fixture
def make_guest(home: Path, peer: Peer) -> Iterator[MakeGuest]:  # noqa: ARG001 - state goes there
    with ExitStack() as stack:

        def make(network: str = "user", **options: object) -> Guest:
            number = next(_NUMBERS)
            options.setdefault("dns", (peer.v4,))
            options.setdefault("name", f"g{number}")
            asked = AttachOptions(**options)  # type: ignore[arg-type]
            return stack.enter_context(Guest(network, asked, f"guest{number}"))

        yield make

"""Machines for the tests: the engine is an option, so that the same bodies run on each.

    pytest tests/functional --engine kvm

Here it is ``bt``; for ``kvm`` the tests in ``kvm/`` run the others in the nested host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from ringfence.machine.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringfence.machine.spec import EngineName


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--engine``."""
    parser.addoption("--engine", default="bt", help="the engine of functional tests")


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> EngineName:
    """What runs the machines."""
    return cast("EngineName", pytestconfig.getoption("--engine"))


@pytest.fixture(scope="session")
def session_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """State and sockets of their own; the cache with its kernels is the user's."""
    folder = tmp_path_factory.mktemp("xdg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def machine(engine: EngineName, session_state: Path) -> Iterator[Machine]:
    """One machine of two processors for all tests of a module that leave it as it was."""
    assert session_state.exists()
    with Machine(engine=engine, vcpus=2) as running:
        yield running

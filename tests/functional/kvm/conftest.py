"""One nested host for all tests here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.framework.nested_host import NestedHost

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def nested_host() -> Iterator[NestedHost]:
    """A booted host with a usable /dev/kvm."""
    with NestedHost() as host:
        yield host

"""A machine's end of a network."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from ringfence.guest.spec import InterfaceSpec
    from ringfence.network.options import PublishedPort

__all__ = ["Attachment", "NetnsPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetnsPlan:
    """What a container's network namespace gets.

    Args:
        device: The interface's name in the namespace.
        how: ``tap`` or ``veth``: what :meth:`Attachment.enter` puts there.
    """

    device: str
    how: str


class Attachment:
    """A machine's end of a network. A context manager: leaving it detaches the machine.

    Args:
        interface: What the guest is told.
        device: The VM document's device; empty for a container.
        fds: Descriptors that the device names.
        hosts: Names that the guest is told beside those that the network answers.
        published: Ports of the host, as they were bound.

    Attributes:
        link: The host's link to a VM's card, if it has one.
        card: The VM process's name for the card.
        frames: Who moves the card's frames, once that is known.
    """

    def __init__(
        self,
        *,
        interface: InterfaceSpec,
        device: Mapping[str, object],
        fds: Sequence[int] = (),
        hosts: Mapping[str, str],
        published: Sequence[PublishedPort] = (),
    ) -> None:
        self._interface = interface
        self.link = ""
        self.frames = ""
        self.card = ""
        self._device = dict(device)
        self._fds = list(fds)
        self.hosts = dict(hosts)
        self.published = tuple(published)
        self._stack = ExitStack()
        self._plan: NetnsPlan | None = None

    def own(self, stack: ExitStack) -> None:
        """Takes over what is to be undone when the machine is detached."""
        self._stack = stack

    @property
    def interface(self) -> InterfaceSpec:
        """What the guest is told."""
        return self._interface

    @property
    def netns_plan(self) -> NetnsPlan | None:
        """What a container's namespace gets; None for a VM."""
        return self._plan

    def keep_from_outside(self) -> None:
        """Another interface of the machine has its way outside and its name servers."""
        self._interface = dataclasses.replace(self._interface, gateways=(), dns=())

    def device_config(self) -> tuple[dict[str, object], list[int]]:
        """The VM document's ``net`` device, and the descriptors that it names."""
        return dict(self._device), list(self._fds)

    def plugged(self, card: Mapping[str, object]) -> None:
        """The VM has the card.

        Args:
            card: The VM process's name for it, and who moves its frames.
        """
        self.card, self.frames = str(card["name"]), str(card["frames"])

    def enter(self, pid: int) -> None:
        """Sets the interface up in the network namespace of a container's process.

        Args:
            pid: A process in it.

        Raises:
            HostError: The host refuses.
        """

    def close(self) -> None:
        """Detaches the machine; may be called again."""
        self._stack.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detaches the machine."""
        self.close()

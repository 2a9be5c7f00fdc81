"""How a machine is attached to a network, as the network package offers it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from ringfence.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager, ExitStack

    from ringfence.guest.spec import InterfaceSpec
    from ringfence.machine.document import Document
    from ringfence.machine.driver import Place
    from ringfence.machine.spec import MachineSpec

__all__ = ["add_networks"]


class _Attachment(Protocol):
    def device_config(self) -> tuple[Mapping[str, object], Sequence[int]]: ...

    @property
    def interface(self) -> InterfaceSpec: ...


class _NetworkModule(Protocol):
    def attach(
        self, network: str, machine_id: str, kind: str
    ) -> AbstractContextManager[_Attachment]: ...


def add_networks(
    document: Document, spec: MachineSpec, place: Place, stack: ExitStack
) -> list[InterfaceSpec]:
    """Attaches the machine, adds the card to the document, and says what the guest is told.

    Raises:
        UnsupportedError: This installation has no networks.
        RingfenceError: As the network says.
    """
    if spec.network == "none":
        if spec.ports:
            message = "a machine without a network can't publish ports"
            raise ConfigError(message, hint="add --network user")
        return []
    try:
        module = cast("_NetworkModule", importlib.import_module("ringfence.network"))
        attach = module.attach
    except (ModuleNotFoundError, AttributeError) as error:
        message = f"machines can't be attached to the network {spec.network!r} yet"
        raise UnsupportedError(message, hint="run it without: --network none") from error
    attachment = stack.enter_context(attach(spec.network, place.machine_id, "vm"))
    device, fds = attachment.device_config()
    document.lend(fds)
    document.add_made_device(device)
    return [attachment.interface]

"""How a machine is attached to a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.errors import ConfigError
from ringfence.network import AttachOptions, PublishedPort, Rate, attach

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ringfence.guest.spec import InterfaceSpec
    from ringfence.machine.document import Document
    from ringfence.machine.driver import Place
    from ringfence.machine.spec import MachineSpec

__all__ = ["add_networks", "attach_options"]


def attach_options(spec: MachineSpec, name: str) -> AttachOptions:
    """What a machine asks of its network.

    Raises:
        ConfigError: A value can't be understood.
    """
    return AttachOptions(
        name=name,
        publish=tuple(PublishedPort.parse(text) for text in spec.ports),
        policy=spec.policy,
        dns=spec.dns,
        hosts=spec.hosts,
        hostname=spec.hostname,
        rate=Rate(send_bytes_per_s=spec.bandwidth, receive_bytes_per_s=spec.bandwidth),
    )


def add_networks(
    document: Document, spec: MachineSpec, place: Place, stack: ExitStack
) -> list[InterfaceSpec]:
    """Attaches the machine, adds the card to the document, and says what the guest is told.

    Raises:
        ConfigError: Something asked for is wrong.
        RingfenceError: As the network says.
    """
    options = attach_options(spec, place.name)
    if spec.network == "none":
        asked = {
            "publish ports": options.publish,
            "have egress rules": options.policy.rules,
            "have name servers": options.dns,
            "know hosts": options.hosts,
            "have a bandwidth": spec.bandwidth is not None,
        }
        for what, given in asked.items():
            if given:
                message = f"a machine without a network can't {what}"
                raise ConfigError(message, hint="add --network user")
        return []
    attachment = stack.enter_context(attach(spec.network, place.machine_id, "vm", options))
    device, fds = attachment.device_config()
    document.lend(fds)
    document.add_made_device(device)
    return [attachment.interface]

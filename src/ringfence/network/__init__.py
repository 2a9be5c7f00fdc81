"""Networks: who a machine reaches, and who reaches it.

=================  ==============================================  =====================
mode               a machine reaches                               needs
=================  ==============================================  =====================
``none``           nothing                                         nothing
``user``           outside, through a gateway in user space        nothing
``isolated``       the machines of its network                     nothing
``nat``            outside, translated; its network; the host      root
``host-only``      the host and its network                        root
``routed:CIDR``    outside by routes, untranslated; its network    root
``bridge:IF``      the LAN that IF is on                           root
=================  ==============================================  =====================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.network.attachment import Attachment, NetnsPlan
from ringfence.network.options import AttachOptions, LinkSpec, PublishedPort, Rate
from ringfence.network.policy import Policy, Rule, parse_rule

if TYPE_CHECKING:
    from ringfence.network.options import Kind

__all__ = [
    "AttachOptions",
    "Attachment",
    "LinkSpec",
    "NetnsPlan",
    "Policy",
    "PublishedPort",
    "Rate",
    "Rule",
    "attach",
    "parse_rule",
]


def attach(
    network: str, machine_id: str, kind: Kind, options: AttachOptions | None = None
) -> Attachment:
    """Attaches a machine to a network.

    Args:
        network: A mode, or the name of a network that was made.
        machine_id: The machine's ID.
        kind: ``vm`` or ``container``.
        options: What the machine asks; nothing in particular when None.

    Returns:
        The machine's end; leave it as a context manager to detach the machine.

    Raises:
        ConfigError: Something asked for is wrong.
        NotFoundError: There is no such network.
        ConflictError: A port or an address is taken.
        UnsupportedError: The mode needs what this user or host doesn't have.
        HostError: The host refuses.
    """
    from ringfence.network import modes  # noqa: PLC0415 - only machines with a network pay for it

    return modes.attach(network, machine_id, kind, options or AttachOptions())

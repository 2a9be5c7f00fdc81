"""From a network's name to what serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.network import manage, user

if TYPE_CHECKING:
    from ringfence.network.attachment import Attachment
    from ringfence.network.options import AttachOptions, Kind

__all__ = ["attach"]


def attach(network: str, machine_id: str, kind: Kind, options: AttachOptions) -> Attachment:
    """See :func:`ringfence.network.attach`."""
    if network == "user":
        attachment = user.attach(machine_id, kind, options)
    else:
        attachment = manage.attach(network, machine_id, kind, options)
    if not options.leads_outside:
        attachment.keep_from_outside()
    return attachment

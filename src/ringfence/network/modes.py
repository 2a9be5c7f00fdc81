"""From a network's name to the mode that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.errors import NotFoundError
from ringfence.network import user

if TYPE_CHECKING:
    from ringfence.network.attachment import Attachment
    from ringfence.network.options import AttachOptions, Kind

__all__ = ["attach"]


def attach(network: str, machine_id: str, kind: Kind, options: AttachOptions) -> Attachment:
    """See :func:`ringfence.network.attach`."""
    if network == "user":
        return user.attach(machine_id, kind, options)
    message = f"there is no network {network!r}"
    hint = "ringfence network ls lists them; ringfence network create makes one"
    raise NotFoundError(message, hint=hint)

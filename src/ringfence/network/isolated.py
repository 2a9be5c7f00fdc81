"""Mode ``isolated``: machines reach each other and nothing else, not even the host. No root.

The switch is a gateway without a way outside; it also tells addresses (DHCP) and names.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ringfence.errors import UnsupportedError
from ringfence.network import shared
from ringfence.network.shared import down, settle

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ringfence.network.attachment import Attachment
    from ringfence.network.options import AttachOptions, Kind
    from ringfence.network.store import Member, NetworkSpec

__all__ = ["check", "down", "join", "settle"]

_LOG = logging.getLogger(__name__)
_WHY = "rules are about what leaves a network, and nothing leaves {}, whose mode is isolated"


def check(spec: NetworkSpec) -> None:
    """See :class:`ringfence.network.manage.Mode`.

    Raises:
        UnsupportedError: It has rules.
    """
    if spec.policy.says_something:
        hint = "machines that must not reach each other belong on networks of their own"
        raise UnsupportedError(_WHY.format(spec.name), hint=hint)


def join(
    spec: NetworkSpec, member: Member, kind: Kind, options: AttachOptions, stack: ExitStack
) -> Attachment:
    """See :class:`ringfence.network.manage.Mode`."""
    if options.policy.says_something:
        # They may be for another of its networks.
        _LOG.warning("%s", _WHY.format(spec.name))
    return shared.join(spec, member, kind, options, stack)

"""Where the programs of the trust boundary are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ringfence.errors import NotFoundError

__all__ = ["Program", "find"]

Program = Literal["ringfence-vm", "ringfence-agent", "ringfence-gateway"]

_PACKAGE = Path(__file__).resolve().parent
# The agent runs in the guest, so it is linked statically.
_STATIC_TARGET = "x86_64-unknown-linux-musl"


def find(name: Program) -> Path:
    """The path of a program that comes with Ringfence.

    Looks in ``RINGFENCE_BIN_DIR``, then in the package, then in a source checkout's build output.

    Raises:
        NotFoundError: It is nowhere; the message says where it was looked for.
    """
    places = list(_places(name))
    for folder in places:
        path = folder / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    looked = ", ".join(str(place) for place in places)
    message = f"the program {name} is missing; looked in {looked}"
    hint = (
        "in a source checkout: make build; else reinstall: pip install --force-reinstall ringfence"
    )
    raise NotFoundError(message, hint=hint)


def _places(name: Program) -> list[Path]:
    chosen = os.environ.get("RINGFENCE_BIN_DIR")
    places = [Path(chosen)] if chosen else []
    places.append(_PACKAGE / "_bin")
    checkout = _PACKAGE.parents[1]
    if (checkout / "Cargo.toml").is_file():
        target = Path(os.environ.get("CARGO_TARGET_DIR", checkout / "target"))
        if name == "ringfence-agent":
            target /= _STATIC_TARGET
        profiles = (
            ("agent", "release", "debug") if name == "ringfence-agent" else ("release", "debug")
        )
        places += [target / profile for profile in profiles]
    return places

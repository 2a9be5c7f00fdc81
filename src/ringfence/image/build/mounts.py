"""What a RUN sees besides its root: caches, other stages' files, secrets.

Source: Docker's Dockerfile reference, "RUN --mount".
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ringfence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.image.build.dockerfile import Instruction

__all__ = ["MountRequest", "cache_directory", "mount_requests"]

_KEYS = frozenset(
    {"type", "target", "source", "from", "id", "readonly", "sharing", "mode", "uid", "gid",
     "required", "size", "env"},
)  # fmt: skip
_ALIASES = {"dst": "target", "destination": "target", "src": "source", "ro": "readonly"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRequest:
    """One ``--mount``.

    Args:
        kind: ``cache``, ``bind``, ``tmpfs`` or ``secret``.
        target: Absolute in the image.
        source: Path in the stage or context.
        origin: Stage or image; empty is the context.
        id: Of a cache or secret.
        read_only: Whether writing is refused.
        required: Of a secret: it must be given.
        mode: Of a new cache directory or a secret.
    """

    kind: str
    target: str
    source: str = ""
    origin: str = ""
    id: str = ""
    read_only: bool = False
    required: bool = False
    mode: int = 0o755


def mount_requests(instruction: Instruction, workdir: str) -> list[MountRequest]:
    """The mounts that a RUN asks for.

    Raises:
        ConfigError: A mount is malformed or of a kind that isn't known.
    """
    return [_request(text, instruction, workdir) for text in instruction.all_flags("mount")]


def _request(text: str, instruction: Instruction, workdir: str) -> MountRequest:
    fields: dict[str, str] = {}
    for part in next(csv.reader([text])):
        key, equals, value = part.partition("=")
        key = _ALIASES.get(key.strip().lower(), key.strip().lower())
        if key in ("rw", "readwrite"):
            key, value, equals = "readonly", "false", "="
        if key not in _KEYS:
            instruction.fail(f"--mount has no option {key!r}")
        fields[key] = value if equals else "true"
    kind = fields.get("type", "bind")
    if kind not in ("cache", "bind", "tmpfs", "secret"):
        instruction.fail(f"--mount=type={kind} is not known")
    identity = fields.get("id", "")
    target = fields.get("target", "")
    if kind == "secret":
        identity = identity or PurePosixPath(target or fields.get("source", "")).name
        target = target or f"/run/secrets/{identity}"
    if not target:
        instruction.fail("--mount needs a target")
    target = str(PurePosixPath(workdir or "/") / target)
    mode = fields.get("mode", "0755" if kind == "cache" else "0400")
    if not mode.isdigit():
        instruction.fail(f"--mount: {mode!r} is not a mode")
    return MountRequest(
        kind=kind,
        target=target,
        source=fields.get("source", "" if kind == "secret" else "/"),
        origin=fields.get("from", ""),
        id=identity or target,
        read_only=fields.get("readonly", "true" if kind == "bind" else "false") == "true",
        required=fields.get("required", "false") == "true",
        mode=int(mode, 8),
    )


def cache_directory(root: Path, request: MountRequest) -> Path:
    """The directory of a cache, made when missing."""
    name = hashlib.sha256(request.id.encode()).hexdigest()[:32]
    path = root / "caches" / name
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(request.mode)
    return path


def secret_file(request: MountRequest, secrets: Mapping[str, Path]) -> Path | None:
    """The file of a secret; None where it isn't given and needn't be.

    Raises:
        ConfigError: It is required, or its file is missing.
    """
    path = secrets.get(request.id)
    if path is None:
        if request.required:
            msg = f"the secret {request.id!r} is required"
            raise ConfigError(msg, hint=f"give it: --secret id={request.id},src=FILE")
        return None
    if not path.is_file():
        msg = f"the secret {request.id!r}: there is no file {path}"
        raise ConfigError(msg)
    return path

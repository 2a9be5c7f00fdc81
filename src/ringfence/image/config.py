"""An image's configuration: what to run in it, and what its layers are.

Source: OCI image specification 1.1, config.md, and Docker's additions (Shell, Healthcheck,
OnBuild).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ringfence.image import jsonio
from ringfence.image.platforms import Platform
from ringfence.image.references import Digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.image.jsonio import Json, JsonObject

__all__ = ["History", "ImageConfig", "chain_ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """One step of how an image came about.

    Args:
        created: RFC 3339 time; empty where unknown.
        created_by: The instruction.
        comment: Free text.
        empty_layer: Whether it added no layer.
    """

    created: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False

    @classmethod
    def from_json(cls, obj: JsonObject, what: str) -> History:
        """Read one entry."""
        return cls(
            created=jsonio.text(obj, "created", what, ""),
            created_by=jsonio.text(obj, "created_by", what, ""),
            comment=jsonio.text(obj, "comment", what, ""),
            empty_layer=obj.get("empty_layer") is True,
        )

    def to_json(self) -> dict[str, Json]:
        """As it stands in a configuration."""
        found: dict[str, Json] = {}
        if self.created:
            found["created"] = self.created
        if self.created_by:
            found["created_by"] = self.created_by
        if self.comment:
            found["comment"] = self.comment
        if self.empty_layer:
            found["empty_layer"] = True
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What to run in an image, and how.

    Args:
        platform: What it runs on.
        env: ``NAME=value``, in order.
        entrypoint: The program and its first arguments.
        cmd: Arguments that a user may replace.
        workdir: Absolute; empty means ``/``.
        user: ``user[:group]``, names or numbers; empty means root.
        labels: Free text by key.
        exposed_ports: ``80/tcp``, for information.
        volumes: Directories that hold data.
        stop_signal: What ends it; empty means SIGTERM.
        shell: What RUN's shell form uses; empty means ``/bin/sh -c``.
        healthcheck: As Docker has it; passed through.
        on_build: Instructions for a build on top of it.
        diff_ids: Digests of the layers' uncompressed tars, lowest first.
        history: How it came about.
        created: RFC 3339 time; empty where unknown.
        author: Free text.
    """

    platform: Platform
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    shell: tuple[str, ...] = ()
    healthcheck: JsonObject = field(default_factory=dict)
    on_build: tuple[str, ...] = ()
    diff_ids: tuple[Digest, ...] = ()
    history: tuple[History, ...] = ()
    created: str = ""
    author: str = ""

    @classmethod
    def parse(cls, raw: bytes, what: str = "image configuration") -> ImageConfig:
        """Read one.

        Raises:
            FormatError: Malformed; the message names the field.
        """
        obj = jsonio.load(raw, what)
        run = jsonio.field_map(obj, "config", what)
        rootfs = jsonio.field_map(obj, "rootfs", what)
        labels = jsonio.field_map(run, "Labels", what)
        return cls(
            platform=Platform.from_json(obj, what),
            env=tuple(jsonio.field_list(run, "Env", what)),
            entrypoint=tuple(jsonio.field_list(run, "Entrypoint", what)),
            cmd=tuple(jsonio.field_list(run, "Cmd", what)),
            workdir=jsonio.text(run, "WorkingDir", what, ""),
            user=jsonio.text(run, "User", what, ""),
            labels={key: str(value) for key, value in labels.items()},
            exposed_ports=tuple(jsonio.field_map(run, "ExposedPorts", what)),
            volumes=tuple(jsonio.field_map(run, "Volumes", what)),
            stop_signal=jsonio.text(run, "StopSignal", what, ""),
            shell=tuple(jsonio.field_list(run, "Shell", what)),
            healthcheck=jsonio.field_map(run, "Healthcheck", what),
            on_build=tuple(jsonio.field_list(run, "OnBuild", what)),
            diff_ids=tuple(Digest.parse(d) for d in jsonio.field_list(rootfs, "diff_ids", what)),
            history=tuple(
                History.from_json(entry, what) for entry in jsonio.objects(obj, "history", what)
            ),
            created=jsonio.text(obj, "created", what, ""),
            author=jsonio.text(obj, "author", what, ""),
        )

    def dump(self) -> bytes:
        """As OCI has it; equal configurations give equal bytes."""
        document: dict[str, Json] = {}
        if self.created:
            document["created"] = self.created
        if self.author:
            document["author"] = self.author
        document.update(self.platform.to_json())
        document["config"] = self._run_json()
        document["rootfs"] = {"type": "layers", "diff_ids": [str(d) for d in self.diff_ids]}
        if self.history:
            document["history"] = [entry.to_json() for entry in self.history]
        return jsonio.dump(document)

    def _run_json(self) -> dict[str, Json]:
        lists: dict[str, Json] = {
            "Env": list(self.env),
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "Shell": list(self.shell),
            "OnBuild": list(self.on_build),
            "WorkingDir": self.workdir,
            "User": self.user,
            "StopSignal": self.stop_signal,
            "Labels": dict(sorted(self.labels.items())),
            "ExposedPorts": {port: {} for port in sorted(self.exposed_ports)},
            "Volumes": {path: {} for path in sorted(self.volumes)},
            "Healthcheck": dict(self.healthcheck),
        }
        return {key: value for key, value in lists.items() if value}


def chain_ids(diff_ids: tuple[Digest, ...]) -> tuple[Digest, ...]:
    """Names of the stacks: the n-th covers layers 0 to n.

    Source: OCI image specification 1.1, config.md, "Layer ChainID".
    """
    found: list[Digest] = []
    for diff_id in diff_ids:
        if not found:
            found.append(diff_id)
        else:
            text = f"{found[-1]} {diff_id}".encode()
            found.append(Digest("sha256", hashlib.sha256(text).hexdigest()))
    return tuple(found)

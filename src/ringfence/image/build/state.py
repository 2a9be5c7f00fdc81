"""A stage in the making: its configuration, layers and variables; and the cache of its steps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ringfence.errors import FormatError
from ringfence.image import jsonio
from ringfence.image.layers import MadeLayer
from ringfence.image.manifests import Descriptor
from ringfence.image.references import Digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.image.config import History, ImageConfig
    from ringfence.image.jsonio import Json
    from ringfence.image.store import Image, Store

__all__ = ["StageState", "StepCache"]


@dataclass(slots=True)
class StageState:
    """What a stage has come to.

    Args:
        config: The configuration.
        layers: The layers' blobs, the lowest first.
        args: Variables of the build that this stage declared.
        cmd_inherited: CMD came with the base image, so ENTRYPOINT drops it.
    """

    config: ImageConfig
    layers: list[Descriptor] = field(default_factory=list)
    args: dict[str, str] = field(default_factory=dict)
    cmd_inherited: bool = True

    @classmethod
    def of_image(cls, image: Image) -> StageState:
        """Begin with an image."""
        config = replace(image.config, on_build=())
        return cls(config=config, layers=list(image.manifest.layers))

    @property
    def env(self) -> dict[str, str]:
        """The image's environment."""
        return dict(text.partition("=")[::2] for text in self.config.env)

    @property
    def variables(self) -> dict[str, str]:
        """What instructions can refer to: ENV goes before ARG."""
        return {**self.args, **self.env}

    def set_env(self, values: Mapping[str, str]) -> None:
        """Add to the environment."""
        env = {**self.env, **values}
        self.config = replace(self.config, env=tuple(f"{k}={v}" for k, v in env.items()))

    def add_layer(self, layer: MadeLayer, history: History) -> None:
        """Put a layer on top."""
        self.layers.append(layer.blob)
        self.config = replace(
            self.config,
            diff_ids=(*self.config.diff_ids, layer.diff_id),
            history=(*self.config.history, history),
        )

    def add_history(self, history: History) -> None:
        """Note a step without a layer."""
        history = replace(history, empty_layer=True)
        self.config = replace(self.config, history=(*self.config.history, history))

    def key(self, *parts: str) -> str:
        """A name for the outcome of a step on top of the layers so far."""
        total = hashlib.sha256()
        for text in (*map(str, self.config.diff_ids), "|", *parts):
            data = text.encode(errors="surrogateescape")
            total.update(b"%d:" % len(data) + data)
        return total.hexdigest()


class StepCache:
    """Layers that earlier builds made, by what went into them.

    Args:
        store: Where they are.
        use: Whether they are used; they are noted anyway.
    """

    def __init__(self, store: Store, *, use: bool) -> None:
        self._store = store
        self._use = use
        self._folder = store.root / "steps"
        self._folder.mkdir(exist_ok=True)

    def get(self, key: str) -> MadeLayer | None:
        """The layer, if it was made and is still here."""
        path = self._folder / f"{key}.json"
        if not self._use or not path.exists():
            return None
        try:
            obj = jsonio.load(path.read_bytes(), str(path))
            (entry,) = jsonio.objects(obj, "layers", str(path))
            blob = Descriptor.from_json(entry, str(path))
            diff_id = Digest.parse(jsonio.text(obj, "diff_id", str(path)))
        except (FormatError, OSError, ValueError):
            return None
        if not self._store.blobs.has(blob.digest):
            return None
        return MadeLayer(
            blob=blob,
            diff_id=diff_id,
            empty=obj.get("empty") is True,
            created=jsonio.text(obj, "created", str(path), ""),
        )

    def put(self, key: str, layer: MadeLayer) -> None:
        """Note a layer."""
        document: dict[str, Json] = {
            "layers": [layer.blob.to_json()],
            "diff_id": str(layer.diff_id),
            "empty": layer.empty,
            "created": layer.created,
        }
        work = self._store.blobs.temporary()
        work.write_bytes(jsonio.dump(document))
        work.rename(self._folder / f"{key}.json")

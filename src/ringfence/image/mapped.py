"""The process that unpacks and removes as root of a user namespace; `idmap.run_mapped` starts it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import FormatError
from ringfence.image import idmap, jsonio
from ringfence.image.compression import Decompressed
from ringfence.image.limits import Limits
from ringfence.image.ownership import Ownership
from ringfence.image.unpack import unpack_layer

if TYPE_CHECKING:
    from ringfence.image.jsonio import Json, JsonObject

__all__ = ["main"]


def _unpack(request: JsonObject) -> dict[str, Json]:
    limits = Limits(
        **{key: jsonio.integer(request, key, "request") for key in Limits.__dataclass_fields__},
    )
    lowers = [Path(path) for path in jsonio.field_list(request, "lowers", "request")]
    blob = Path(jsonio.text(request, "blob", "request"))
    target = Path(jsonio.text(request, "target", "request"))
    with blob.open("rb", buffering=0) as file, Decompressed(file, limits) as tar:
        done = unpack_layer(
            tar,
            target,
            ownership=Ownership.KEEP,
            limits=limits,
            lowers=lowers,
        )
    return {"digest": str(tar.digest), "needs_lower": done.needs_lower}


def main(text: str) -> int:
    """Do what the request says and print the answer."""
    request = jsonio.load(text, "request")
    idmap.enter()
    answer: dict[str, Json] = {}
    if "remove" in request:
        shutil.rmtree(jsonio.text(request, "remove", "request"), ignore_errors=True)
    else:
        try:
            answer = _unpack(request)
        except FormatError as error:
            answer = {"refused": error.message}
    sys.stdout.buffer.write(jsonio.dump(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""JSON documents read with their types checked: each complaint names the field and the document."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeAlias, cast

from ringfence.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Json",
    "JsonObject",
    "dump",
    "field_list",
    "field_map",
    "integer",
    "load",
    "objects",
    "text",
]

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = "Mapping[str, Json]"

MAX_DOCUMENT_BYTES = 8 * 1024 * 1024
"""Manifests and configurations larger than this are refused (registries accept 4 MiB)."""


def load(data: bytes | str, what: str) -> JsonObject:
    """Parse one JSON object.

    Args:
        data: UTF-8 text, at most ``MAX_DOCUMENT_BYTES`` long.
        what: What it is, for messages.

    Raises:
        FormatError: Not JSON, not an object, nested too deep or too long.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        msg = f"{what} is {len(data)} bytes long; at most {MAX_DOCUMENT_BYTES} are read"
        raise FormatError(msg)
    try:
        value = cast("Json", json.loads(data))
    except (ValueError, RecursionError) as error:
        msg = f"{what} is not JSON: {error}"
        raise FormatError(msg) from error
    if not isinstance(value, dict):
        msg = f"{what} is not a JSON object"
        raise FormatError(msg)
    return value


def dump(value: JsonObject) -> bytes:
    """The object as compact UTF-8 with its keys in the order given: equal input, equal bytes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def text(obj: JsonObject, key: str, what: str, default: str | None = None) -> str:
    """The string at `key`; `default` where it is absent or null.

    Raises:
        FormatError: Another type, or absent with no default.
    """
    value = obj.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        msg = f"{what}: {key} is not a string"
        raise FormatError(msg)
    return value


def integer(obj: JsonObject, key: str, what: str, default: int | None = None) -> int:
    """The whole number, 0 or more, at `key`.

    Raises:
        FormatError: Another type, negative, or absent with no default.
    """
    value = obj.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        msg = f"{what}: {key} is not a number of 0 or more"
        raise FormatError(msg)
    return value


def objects(obj: JsonObject, key: str, what: str) -> list[JsonObject]:
    """The list of objects at `key`; empty where it is absent or null.

    Raises:
        FormatError: Another type.
    """
    value = obj.get(key)
    if value is None:
        return []
    found = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(found) != len(value):
        msg = f"{what}: {key} is not a list of objects"
        raise FormatError(msg)
    return list(found)


def field_list(obj: JsonObject, key: str, what: str) -> list[str]:
    """The list of strings at `key`; empty where it is absent or null.

    Raises:
        FormatError: Another type.
    """
    value = obj.get(key)
    if value is None:
        return []
    found = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(found) != len(value):
        msg = f"{what}: {key} is not a list of strings"
        raise FormatError(msg)
    return found


def field_map(obj: JsonObject, key: str, what: str) -> JsonObject:
    """The object at `key`; empty where it is absent or null.

    Raises:
        FormatError: Another type.
    """
    value = obj.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        msg = f"{what}: {key} is not an object"
        raise FormatError(msg)
    return value

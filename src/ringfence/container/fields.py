"""Typed access to a JSON document's fields; errors carry the field's path."""

from __future__ import annotations

from ringfence.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Fields"]


class Fields:
    """One object of a document.

    Args:
        values: The object as it was parsed; None stands for an empty one.
        place: Its path in the document, for messages.
    """

    __slots__ = ("place", "values")

    def __init__(self, values: object, place: str = "") -> None:
        self.place = place
        self.values: dict[str, object] = {}
        if isinstance(values, dict):
            self.values = values
        elif values is not None:
            self._fail("", "an object", values)

    def _fail(self, name: str, wanted: str, value: object) -> None:
        place = f"{self.place}.{name}".strip(".") or "the document"
        message = f"{place} must be {wanted}, not {value!r:.80}"
        raise ConfigError(message)

    def __contains__(self, name: str) -> bool:
        """Whether a field is there and isn't null."""
        return self.values.get(name) is not None

    def text(self, name: str, default: str = "") -> str:
        """A string, without zero bytes."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or "\0" in value:
            self._fail(name, "a string without zero bytes", value)
            return default
        return value

    def integer(self, name: str, default: int = 0) -> int:
        """A whole number."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail(name, "a whole number", value)
            return default
        return value

    def optional_integer(self, name: str) -> int | None:
        """A whole number, or None where there is none."""
        return self.integer(name) if name in self else None

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._fail(name, "true or false", value)
            return default
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        items = self._list(name)
        if not all(isinstance(item, str) and "\0" not in item for item in items):
            self._fail(name, "a list of strings without zero bytes", items)
        return [str(item) for item in items]

    def integers(self, name: str) -> list[int]:
        """A list of whole numbers."""
        numbers: list[int] = []
        for item in self._list(name):
            if isinstance(item, bool) or not isinstance(item, int):
                self._fail(name, "a list of whole numbers", item)
                continue
            numbers.append(item)
        return numbers

    def table(self, name: str) -> Fields:
        """An object; an empty one where there is none."""
        return Fields(self.values.get(name), f"{self.place}.{name}".strip("."))

    def tables(self, name: str) -> Iterator[Fields]:
        """A list of objects."""
        place = f"{self.place}.{name}".strip(".")
        for index, item in enumerate(self._list(name)):
            yield Fields(item, f"{place}[{index}]")

    def mapping(self, name: str) -> dict[str, str]:
        """An object of strings."""
        values = self.table(name).values
        result: dict[str, str] = {}
        for key, value in values.items():
            if not isinstance(value, str):
                self._fail(f"{name}.{key}", "a string", value)
            result[key] = str(value)
        return result

    def _list(self, name: str) -> list[object]:
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self._fail(name, "a list", value)
            return []
        return value

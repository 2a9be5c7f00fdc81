"""JSON by the interpreter's own C parts, without the modules around them.

``import json`` loads the regular expressions and enums, which costs a short-lived process more than
the parsing. Where an interpreter has no such parts, or other ones, the ``json`` module does it.
"""

from __future__ import annotations

from ringfence.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

__all__ = ["dumps", "loads"]

_BLANK = " \t\n\r"


class _Grammar:
    """What the C scanner asks its context for."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner looks for an attribute, not a field


def _scanner() -> Callable[[str, int], tuple[Json, int]] | None:
    try:
        from _json import make_scanner
    except ImportError:
        return None
    return make_scanner(_Grammar())  # type: ignore[arg-type] # it wants these attributes alone


def loads(text: str | bytes, what: str = "the document") -> Json:
    """The value of a JSON text.

    Args:
        text: The whole text; bytes are UTF-8.
        what: Its name, for the error's message.

    Raises:
        FormatError: It isn't JSON.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        scan = _scanner()
        if scan is None:
            import json

            value: Json = json.loads(text)
            return value
        start = len(text) - len(text.lstrip(_BLANK))
        value, end = scan(text, start)
        if text[end:].strip(_BLANK):
            message = f"{what} isn't JSON: something follows its end at character {end}"
            raise FormatError(message)
    except StopIteration as error:
        message = f"{what} isn't JSON: a value is missing at character {error.value}"
        raise FormatError(message) from error
    except (ValueError, RecursionError) as error:
        message = f"{what} isn't JSON: {error}"
        raise FormatError(message) from error
    return value


def _refuse(value: object) -> str:
    message = f"{type(value).__name__} has no form in JSON"
    raise TypeError(message)


def dumps(value: object) -> str:
    """A value of plain dicts, lists, strings and numbers as JSON in one line."""
    try:
        from _json import encode_basestring_ascii, make_encoder

        encode = make_encoder(
            None,
            _refuse,
            encode_basestring_ascii,
            None,
            ":",
            ",",
            *(False, False, False),  # unsorted keys, no skipped keys, no infinite numbers
        )
        return "".join(encode(value, 0))
    except (ImportError, TypeError):
        import json

        return json.dumps(value, separators=(",", ":"))

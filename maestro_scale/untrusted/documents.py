"""Bounded parsing of JSON."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from maestro_scale.errors import dotted, shorten
from maestro_scale.untrusted.limits import (
    DOCUMENT,
    FLOAT_CHARACTERS,
    NUMBER_CHARACTERS,
    InputError,
    Limits,
    at,
    size_text,
)

T = TypeVar("T")


def load_json(text: str | bytes, where: str = "", limits: Limits = DOCUMENT, allow_nan: bool = False) -> Any:
    """Parse JSON within ``limits``.

    ``where`` names the document in messages; leave it empty where the caller adds it. ``allow_nan``: accept NaN and
    infinities, also a number such as 1e999.

    Raises:
        InputError: not JSON, too large, nested too deep, a key twice, a number too long or not finite, or text that is
            not valid Unicode.
    """
    try:
        return _load_json(text, limits, allow_nan)
    except RecursionError:
        raise InputError(at(where, f"is nested more than {limits.depth} levels deep")) from None
    except InputError as error:
        raise InputError(at(where, str(error))) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(at(where, f"is not JSON ({error})")) from None


def read_json(path: Path, limits: Limits = DOCUMENT, allow_nan: bool = False) -> Any:
    """As :func:`load_json`, of a file. InputError if it is not a regular file; OSError if it cannot be read."""
    return load_json(read_bytes(path, limits), str(path), limits, allow_nan)


def read_record(path: Path, limits: Limits = DOCUMENT, allow_nan: bool = False) -> dict[str, Any]:
    """As :func:`read_json`, of a file that must hold an object."""
    return field_of(read_json(path, limits, allow_nan), dict, where=str(path))


def read_json_lines(path: Path, limits: Limits = DOCUMENT, allow_nan: bool = False) -> Iterator[Any]:
    """The values of a file with one JSON document per line; ``limits`` hold for each line.

    Lines that cannot be parsed are skipped: a kill or a full disk leaves the last one incomplete. InputError if the
    file is not a regular file; OSError if it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        while line := file.readline(limits.bytes + 1):
            with contextlib.suppress(InputError):
                yield load_json(line, "", limits, allow_nan)


def field_of(value: Any, kind: type[T], *path: str | int, where: str = "") -> T:
    """The value of type ``kind`` at ``path`` of a parsed document. InputError if it is missing or of another type."""
    for number, part in enumerate(path):
        fits = isinstance(value, dict) if isinstance(part, str) else isinstance(value, list)
        if not fits or (part not in value if isinstance(part, str) else not 0 <= part < len(value)):
            raise InputError(at(where, f"has no {dotted(path[: number + 1])}"))
        value = value[part]
    if type(value) is not kind:
        name = _KIND_NAMES.get(kind, kind.__name__)
        raise InputError(at(where, f"{dotted(path) or 'the document'} is {shorten(value)}, expected {name}"))
    return value


_KIND_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "an integer",
    float: "a number",
}


def read_bytes(path: Path, limits: Limits = DOCUMENT, pipe: bool = False) -> bytes:
    """Content of a file. InputError if it is larger than ``limits``, or neither a regular file nor, with ``pipe``, a
    pipe or a device; OSError."""
    if not pipe:
        check_regular(path)
    with path.open("rb") as file:
        # One byte more than the limit: the size that stat reports can change, and is 0 for a pipe.
        content = file.read(limits.bytes + 1)
    if len(content) > limits.bytes:
        raise InputError(f"{path}: is larger than {size_text(limits.bytes)}")
    return content


def check_regular(path: Path) -> None:
    """InputError if ``path`` is not a regular file; OSError if it does not exist."""
    # Before it is opened: a named pipe would block, a device would never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path}: is not a regular file")


def check_size(num_bytes: int, where: str, limits: Limits = DOCUMENT) -> None:
    """InputError if a document is larger than ``limits``; for sizes that are known before reading."""
    if num_bytes > limits.bytes:
        raise InputError(at(where, f"has {num_bytes} bytes, more than {size_text(limits.bytes)}"))


def _load_json(text: str | bytes, limits: Limits, allow_nan: bool) -> Any:
    check_size(len(text), "", limits)
    if isinstance(text, (bytes, bytearray)):
        text = text.decode("utf-8-sig" if text[:3] == codecs.BOM_UTF8 else "utf-8")
    # An upper bound of the number of values, before any of them is created: an empty list takes 2 bytes of text and
    # 64 of memory. Commas and brackets within strings count too, which the limits leave space for.
    containers = text.count("[") + text.count("{")
    if containers + text.count(",") + text.count(":") > 2 * limits.entries:
        raise InputError(f"has more than {limits.entries} entries")
    # A function called for each integer doubles the time of a header, so it is used only where it can matter.
    decoder = _DECODERS[allow_nan, _LONG_INTEGER.search(f" {text}") is not None]
    value = decoder.decode(text)
    has_surrogates = not text.isascii() or ("\\u" in text and _SURROGATE.search(text) is not None)
    if containers > limits.depth or len(text) > limits.text or has_surrogates:
        _check_values(value, limits, has_surrogates)
    return value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Only what can be an integer of JSON: the digits of a text follow a quotation mark or a letter.
_LONG_INTEGER = re.compile(rf"[:,\[ \t\r\n-][0-9]{{{NUMBER_CHARACTERS}}}")


def _check_values(value: Any, limits: Limits, has_surrogates: bool) -> None:
    """Depth and texts of a parsed document, level by level: a loop, because recursion is what is bounded here."""
    level = [value]
    for _ in range(limits.depth + 1):
        containers = [item for item in level if type(item) in (dict, list)]
        texts = [item for item in level if type(item) is str]
        texts += [key for item in containers if type(item) is dict for key in item]
        if texts and max(map(len, texts)) > limits.text:
            raise InputError(f"contains a text of more than {limits.text} characters")
        # A lone surrogate can be neither printed nor written.
        if has_surrogates and not all(map(_is_unicode, texts)):
            raise InputError("contains text that is not valid Unicode (a lone surrogate)")
        if not containers:
            return
        level = [item for part in containers for item in (part.values() if type(part) is dict else part)]
    raise InputError(f"is nested more than {limits.depth} levels deep")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f"contains the key {shorten(twice)} twice")
    return values


def _integer(text: str) -> int:
    # Python parses long integers in quadratic time, and since 3.10.7 refuses more than 4,300 digits.
    if len(text) > NUMBER_CHARACTERS:
        raise InputError(f"contains an integer of {len(text)} digits; at most {NUMBER_CHARACTERS} are read")
    return int(text)


def _finite(text: str) -> float:
    value = float(text) if len(text) <= FLOAT_CHARACTERS else math.inf
    if not math.isfinite(value):
        raise InputError(f"contains the number {shorten(text)}, which is too large or too long")
    return value


def _refuse_constant(constant: str) -> float:
    raise InputError(f"contains {constant}, which is not a number")


# Created once: the header of a sample is parsed in about the time that creating a decoder takes.
_DECODERS = {
    (allow_nan, has_long_integer): json.JSONDecoder(
        object_pairs_hook=_unique,
        parse_int=_integer if has_long_integer else None,
        parse_float=None if allow_nan else _finite,
        parse_constant=None if allow_nan else _refuse_constant,
    )
    for allow_nan in (False, True)
    for has_long_integer in (False, True)
}

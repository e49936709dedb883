"""The base class of all expected errors, and how error messages name a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from maestro_scale.escaping import printable_lines


class MaestroError(Exception):
    """Bad input or a bad environment: a user's mistake, not a bug.

    The message is one line: what is wrong, where, and what to do. Entry points print it and exit with
    ``entry.USAGE``; anything that is not a MaestroError ends in a traceback.
    """

    same_on_all_ranks = False
    """Whether all ranks raise it together, so that rank 0 alone reports it."""

    def __str__(self) -> str:
        return message_text(super().__str__())


MAX_MESSAGE = 4000
"""Characters of a message. Names in it may come from data and have any length."""


def message_text(text: str) -> str:
    """``text`` cut to ``MAX_MESSAGE`` characters, with control characters escaped, which a terminal would obey."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE * 3 // 4]} … {text[-MAX_MESSAGE // 5 :]}"
    return printable_lines(text)


def shorten(value: object, length: int = 60) -> str:
    """``repr(value)``, cut to ``length`` characters. Does not format more of a text than is shown."""
    if isinstance(value, (str, bytes)) and len(value) > length:
        return f"{value[: length - 3]!r}…"
    text = ""
    for part in _repr_parts(value):
        text += part
        if len(text) > length:
            return f"{text[: length - 1]}…"
    return text


def _repr_parts(value: object) -> Iterator[str]:
    """``repr(value)`` in parts. Nested containers are formatted as far as the parts are read: containers that contain
    each other several times have a text of exponential length, and deep ones exceed Python's recursion limit."""
    brackets = _BRACKETS.get(type(value))
    if brackets is None:
        yield repr(value)
        return
    assert isinstance(value, (list, tuple, dict))  # the keys of _BRACKETS
    yield brackets[0]
    for number, item in enumerate(value):
        yield ", " if number else ""
        yield from _repr_parts(item)
        if isinstance(value, dict):
            yield ": "
            yield from _repr_parts(value[item])
    yield ",)" if isinstance(value, tuple) and len(value) == 1 else brackets[1]


_BRACKETS: dict[type, str] = {list: "[]", tuple: "()", dict: "{}"}


KeyPath = tuple[str | int, ...]
"""Path of a value in a nested structure: ``("data", "mixture", 0, "shards")``."""


def dotted(path: KeyPath) -> str:
    """``("data", "mixture", 0, "shards")`` → ``data.mixture[0].shards``, as ``--set`` takes it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


_MAX_NAME, _MAX_NAMES = 100, 50


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or the whole list when none is close."""
    # The comparison is quadratic in the length of the names.
    names = sorted(n for n in known if len(n) <= _MAX_NAME)
    if len(str(name)) > _MAX_NAME:
        return ""
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return (
        f" (there are: {', '.join(names[:_MAX_NAMES])}{', …' if len(names) > _MAX_NAMES else ''})"
        if names
        else ""
    )

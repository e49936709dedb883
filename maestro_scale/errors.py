"""The base class of all expected errors, and how error messages name a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


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

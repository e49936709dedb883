"""How a recipe says no: where the mistake is, what it is, and the nearest right spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from maestro_scale.errors import MaestroError

Loc = tuple[str | int, ...]  # ("data", "mixture", 0, "shards")


class RecipeError(MaestroError, ValueError):
    """A recipe cannot be used. The message has one line per mistake: ``file: key.path: reason``."""


class ConflictError(ValueError):
    """Values that are each valid but do not go together: (key path from here, reason) of each mistake."""

    def __init__(self, *problems: tuple[Loc, str]) -> None:
        super().__init__("\n".join(f"{dotted(loc)}: {reason}" for loc, reason in problems))
        self.problems = problems


def dotted(loc: Loc) -> str:
    """``("data", "mixture", 0, "shards")`` → ``data.mixture[0].shards``, as ``--set`` takes it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or the whole list when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (there are: {', '.join(known)})" if known else ""

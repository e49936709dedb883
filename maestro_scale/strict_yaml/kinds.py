"""Tells recipes, studies and descriptions of datasets from each other, where one was given for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Kind of document → the key that every document of the kind has and no other, and the command that uses it.
_KINDS = {
    "recipe": ("data", "maestro-scale train --recipe"),
    "study": ("scales", "maestro-scale study"),
    "description": ("rasters", "maestro-scale shard"),
}


def mistaken(data: Mapping[str, Any], kind: str) -> str | None:
    """What to say of ``data`` if it is no document of ``kind`` but one of another kind; else None."""
    if kind not in _KINDS or _KINDS[kind][0] in data:
        return None
    other = next((k for k, (key, _) in _KINDS.items() if key in data), None)
    return None if other is None else f"is a {other}, not a {kind}: use it with `{_KINDS[other][1]}`"

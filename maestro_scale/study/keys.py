"""Keys of a recipe in a study: those of levels, setups, evaluations and searches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

_FIXED = {
    ("seed",): "list the seeds of the setup",
    ("data", "mixture", "0", "shards"): "give the data of the setup or of the evaluation",
}
"""Keys of a recipe that the study sets itself, and where they are chosen."""


def key_path(key: str) -> tuple[str, ...]:
    """The parts of a key, as in ``--set``: ``mixture[0]`` and ``mixture.0`` are the same."""
    return tuple(re.findall(r"[^.\[\]]+", key))


def without_fixed(keys: dict[str, Any]) -> dict[str, Any]:
    """ValueError if a key, or a section or list that it sets, contains one that the study sets itself."""
    for key, value in keys.items():
        for path in _paths(value, key_path(key)):
            if path in _FIXED:
                raise ValueError(f"{'.'.join(path)} is set by the study: {_FIXED[path]} instead")
    return keys


def _paths(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of a value and of all that it contains."""
    yield path
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, *key_path(str(key))))


Key = Annotated[str, Field(min_length=1, max_length=200)]
"""A key of a recipe, as in ``--set``."""
Keys = Annotated[dict[Key, Any], AfterValidator(without_fixed)]
"""Recipe keys with their values, as in ``--set``: ``{"model.target": "patch"}``. Neither the seed nor the shards of the
first dataset, which the study sets."""

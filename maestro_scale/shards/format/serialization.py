"""Conversion between frozen dataclasses and JSON, for the manifest and the index."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from maestro_scale import untrusted
from maestro_scale.shards.errors import ManifestError

T = TypeVar("T")


def to_builtins(value: Any) -> Any:
    """A dataclass (of dataclasses, tuples, mappings and scalars) as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)
        # Scale("log", 5) and Scale("log", 5.0) are equal, so they must give the same JSON and the same digest.
        return {
            name: float(getattr(value, name)) if is_float else to_builtins(getattr(value, name))
            for name, is_float in _fields(kind)
            if not _is_omitted(kind, name, getattr(value, name))
        }
    if isinstance(value, Mapping):
        return {key: to_builtins(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [to_builtins(item) for item in value]
    return value


@cache  # resolving the hints takes longer than converting an entry, and a manifest has one per shard
def _fields(kind: type) -> list[tuple[str, bool]]:
    """Name of each field of a dataclass, and whether it is a float."""
    hints = typing.get_type_hints(kind)
    return [(f.name, hints[f.name] is float) for f in dataclasses.fields(kind)]


def _is_omitted(kind: type, name: str, value: Any) -> bool:
    """Whether a field that is written only where it differs from its default has the default (spec.OMIT_DEFAULT)."""
    return name in _optional(kind) and value == _optional(kind)[name]


@cache
def _optional(kind: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(kind) if f.metadata.get("omit_default")}


def from_builtins(kind: type[T], data: Any) -> T:
    """The inverse of :func:`to_builtins`. ManifestError, with the path of the entry, for a wrong type or key."""
    try:
        return untrusted.from_builtins(kind, data)
    except untrusted.InputError as error:
        raise ManifestError(str(error)) from None


def dump_json(data: Any, depth: int, level: int = 0) -> str:
    """JSON with one line per entry of objects down to ``depth`` and of lists of objects, readable and easy to diff."""
    inner, outer = " " * (level + 1), " " * level
    if isinstance(data, dict) and data and level < depth:
        entries = [f"{json.dumps(k)}: {dump_json(v, depth, level + 1)}" for k, v in data.items()]
        return "{\n" + ",\n".join(inner + e for e in entries) + "\n" + outer + "}"
    if isinstance(data, list) and data and isinstance(data[0], dict):
        entries = [json.dumps(item, ensure_ascii=False) for item in data]
        return "[\n" + ",\n".join(inner + e for e in entries) + "\n" + outer + "]"
    return json.dumps(data, ensure_ascii=False)

"""Strict conversion between frozen dataclasses and JSON values, for the manifest and the index.

Strict, because manifests are also written by hand: an unknown key or a wrong type is an error that names its path.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from maestro_scale.shards.errors import ManifestError

T = TypeVar("T")


def to_builtins(value: Any) -> Any:
    """A dataclass (of dataclasses, tuples, mappings and scalars) as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        plain = {f.name: to_builtins(getattr(value, f.name)) for f in dataclasses.fields(value)}
        # Scale("log", 5) and Scale("log", 5.0) are equal, so they must give the same JSON and the same digest.
        return {k: float(v) if hints[k] is float else v for k, v in plain.items()}
    if isinstance(value, Mapping):
        return {key: to_builtins(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_builtins(item) for item in value]
    return value


def from_builtins(kind: type[T], data: Any, where: str = "") -> T:
    """The inverse of :func:`to_builtins`: an instance of the dataclass ``kind``.

    Fields with a default may be missing. ManifestError, with the path of the entry, for an unknown key, a missing
    required one or a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise ManifestError(f"{where or 'the document'}: is {_shorten(data)}, expected an object")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T is a dataclass, see above
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ManifestError(f"{_join(where, key)}: no such key; {hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ManifestError(f"{_join(where, name)}: is missing")
    return kind(**{key: _value(hints[key], item, _join(where, key)) for key, item in data.items()})


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)  # is_dataclass also accepts instances; a hint is a class
        return from_builtins(hint, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ManifestError(f"{where}: is {_shorten(data)}, expected a list")
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise ManifestError(f"{where}: is {_shorten(data)}, expected an object")
        return {key: _value(args[1], item, _join(where, key)) for key, item in data.items()}
    if origin is Literal:
        if data not in args:
            raise ManifestError(f"{where}: is {data!r}, expected one of {', '.join(map(repr, args))}")
        return data
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), data, where)
    return _scalar(hint, data, where)


def _scalar(hint: type, data: Any, where: str) -> Any:
    # In JSON, 1 is also a valid float. In Python, bool is a subclass of int, but true is not a number.
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise ManifestError(f"{where}: is {_shorten(data)}, expected {hint.__name__}")
    return data


def _shorten(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


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

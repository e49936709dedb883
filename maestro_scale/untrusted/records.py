"""Strict conversion of JSON values to frozen dataclasses: manifests, indexes, results and other records.

Strict, because such files are also written by hand and by others: an unknown key or a wrong type is an error that names
its path.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union

from maestro_scale.errors import dotted, shorten
from maestro_scale.untrusted.limits import InputError, at

T = TypeVar("T")
Convert = Callable[[Any], Any]

_INTEGERS = range(-(2**63), 2**63)  # numpy and torch have no larger ones


def from_builtins(kind: type[T], data: Any) -> T:
    """An instance of the dataclass ``kind`` from the dicts, lists and scalars of a JSON document.

    Fields may be scalars, dataclasses, tuples, lists, mappings, literals, optional or Any; of a union, the first type
    is read. Fields with a default may be missing. InputError, with the path of the entry, for an unknown key, a missing
    required one or a value of the wrong type.
    """
    try:
        return _converter(kind)(data)  # type: ignore[arg-type]  # mypy: a class of a TypeVar is not Hashable
    except _Mismatch as error:
        path = dotted(tuple(reversed(error.path)))
        raise InputError(at(path, error.reason)) from None


class _Mismatch(Exception):
    """A value of the wrong type. Each level appends its part of the path: building paths before is too slow."""

    def __init__(self, reason: str, *path: str | int) -> None:
        super().__init__(reason)
        self.reason, self.path = reason, list(path)


@cache  # per class: a manifest may have 300,000 entries of one class
def _converter(hint: Any) -> Convert:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)  # is_dataclass also accepts instances; a hint is a class
        return _to_dataclass(hint)
    if origin is tuple:
        return _to_tuple(args)
    if origin is list:
        return _to_list(_to_tuple((*args, ...)))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return _to_mapping(_converter(args[1]))
    if origin is Literal:
        return _to_literal(args)
    if origin in (Union, types.UnionType):
        convert = _converter(next(a for a in args if a is not type(None)))
        return _to_optional(convert) if type(None) in args else convert
    return (lambda data: data) if hint is Any else _to_scalar(hint)


def _to_dataclass(kind: type) -> Convert:
    hints = typing.get_type_hints(kind)
    fields = [f for f in dataclasses.fields(kind) if f.init]
    convert = {f.name: _converter(hints[f.name]) for f in fields}
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]

    def converted(data: Any) -> Any:
        if not isinstance(data, dict):
            raise _Mismatch(f"is {shorten(data)}, expected an object")
        if not data.keys() <= convert.keys():
            raise _unknown_key(next(key for key in data if key not in convert), list(convert))
        if len(data) < len(convert) and (missing := [name for name in required if name not in data]):
            raise _Mismatch("is missing", missing[0])
        values = _each(data, convert)
        try:
            return kind(**values)
        except ValueError as error:  # of its own checks
            raise _Mismatch(str(error)) from None

    return converted


def _unknown_key(key: str, known: list[str]) -> _Mismatch:
    near = difflib.get_close_matches(key, known, n=1) if len(key) < 100 else []
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return _Mismatch(f"no such key; {hint}", key if len(key) < 100 else shorten(key))


def _each(data: dict[str, Any], convert: Mapping[str, Convert]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    key = ""
    try:
        for key, item in data.items():
            values[key] = convert[key](item)
    except _Mismatch as error:
        error.path.append(key)
        raise
    return values


def _to_tuple(args: tuple[Any, ...]) -> Convert:
    convert = _converter(args[0])
    length = None if args[-1] is Ellipsis else len(args)

    def converted(data: Any) -> tuple[Any, ...]:
        if not isinstance(data, (list, tuple)):  # a tuple: plain values that were never written as JSON
            raise _Mismatch(f"is {shorten(data)}, expected a list")
        if length is not None and len(data) != length:
            raise _Mismatch(f"has {len(data)} entries, expected {length}")
        # Lists of integers, such as the offsets of all samples of a shard, are most of an index.
        if (
            args[0] is int
            and set(map(type, data)) == {int}
            and min(data) in _INTEGERS
            and max(data) in _INTEGERS
        ):
            return tuple(data)
        values = []
        for item in data:
            try:
                values.append(convert(item))
            except _Mismatch as error:
                error.path.append(len(values))
                raise
        return tuple(values)

    return converted


def _to_list(convert: Convert) -> Convert:
    return lambda data: list(convert(data))


def _to_mapping(convert: Convert) -> Convert:
    def converted(data: Any) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise _Mismatch(f"is {shorten(data)}, expected an object")
        return _each(data, dict.fromkeys(data, convert))

    return converted


def _to_literal(allowed: tuple[Any, ...]) -> Convert:
    def converted(data: Any) -> Any:
        if data not in allowed:
            raise _Mismatch(f"is {shorten(data)}, expected one of {', '.join(map(repr, allowed))}")
        return data

    return converted


def _to_optional(convert: Convert) -> Convert:
    return lambda data: None if data is None else convert(data)


def _to_scalar(kind: type) -> Convert:
    def converted(data: Any) -> Any:
        if type(data) is kind and (kind is not int or data in _INTEGERS):
            return data
        # In JSON, 1 is also a valid float. In Python, bool is a subclass of int, but true is not a number.
        if kind is float and type(data) is int:
            return float(data)
        raise _Mismatch(f"is {shorten(data)}, expected {kind.__name__}")

    return converted

"""Validates documents, and turns validation errors into messages that say what to change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from maestro_scale.errors import KeyPath, did_you_mean, dotted
from maestro_scale.strict_yaml.errors import ConflictError, DocumentError
from maestro_scale.strict_yaml.fields import Section
from maestro_scale.strict_yaml.merge import Tree

Document = TypeVar("Document", bound=Section)


def validated(tree: Tree, schema: type[Document]) -> Document:
    """The document of ``schema`` in ``tree``; DocumentError if it is not one."""
    try:
        return _validate(tree.data, schema)
    except ValidationError as error:
        first = error
    # A value from the environment was parsed as YAML (0012 became 12), but text fields need it as written.
    data = tree.data
    for loc in (tuple(e["loc"]) for e in first.errors() if e["type"] == "string_type"):
        if loc in tree.texts:
            data = _replaced(data, loc, tree.texts[loc])
    try:
        return _validate(data, schema)
    except ValidationError as error:
        raise DocumentError("\n".join(_lines(error, tree, schema))) from None


def _validate(data: Mapping[str, Any], schema: type[Document]) -> Document:
    # In strict mode pydantic accepts a list for a tuple only from JSON; it still refuses text for a number.
    return schema.model_validate_json(json.dumps(data, default=str))


def _replaced(node: Any, loc: KeyPath, value: Any) -> Any:
    if not loc:
        return value
    if isinstance(node, list):
        return [_replaced(v, loc[1:], value) if i == loc[0] else v for i, v in enumerate(node)]
    return {**node, loc[0]: _replaced(node[loc[0]], loc[1:], value)}


def _lines(error: ValidationError, tree: Tree, schema: type[BaseModel]) -> Iterator[str]:
    for e in error.errors():
        loc, cause = tuple(e["loc"]), e.get("ctx", {}).get("error")
        parts = cause.problems if isinstance(cause, ConflictError) else [((), _reason(e, loc, schema))]
        for sub, reason in parts:
            where = (*loc, *sub)
            yield f"{tree.origin(where)}: {dotted(where)}: {reason}"


def _reason(error: Mapping[str, Any], loc: KeyPath, schema: type[BaseModel]) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(loc[-1], _keys_of(schema, loc[:-1]))}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        known = [part.strip("' ") for part in context["expected"].replace(" or ", ", ").split(", ")]
        hint = did_you_mean(given, known).partition(" (there are")[0]
        return f"must be {context['expected']}, got {given!r}{hint}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, got {given!r}"
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "tuple_type": "a list",
        "dict_type": "a mapping of keys to values",
        "model_type": "a mapping of keys to values",
    }.get(kind)
    if wanted:
        return f"must be {wanted}, got {given!r}"
    return f"{error['msg'].removeprefix('Input ').removeprefix('Value ')}, got {given!r}"


def _keys_of(model: type[BaseModel], loc: KeyPath) -> list[str]:
    """The field names of the section that ``loc`` leads to."""
    for part in loc:
        if part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for arg in get_args(annotation) if (m := _model_in(arg))), None)

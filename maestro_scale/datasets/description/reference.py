"""The keys of a description as a JSON schema for editors, and as tables for docs/description.md.

``python -m maestro_scale.datasets.description.reference`` writes the tables and descriptions/description.schema.json
again; a test compares them with the models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.sections.grid import Area, Grid
from maestro_scale.datasets.description.sections.images import Band, Dates, ImageFiles, MaskRule
from maestro_scale.datasets.description.sections.rasters import (
    FurtherSensor,
    Raster,
    SensorPreset,
    SensorScale,
)
from maestro_scale.datasets.description.sections.splits import SplitBlocks, SplitColumn, SplitLists, Splits
from maestro_scale.datasets.description.sections.targets import (
    RasterTarget,
    TableTarget,
    Target,
    VectorTarget,
)
from maestro_scale.strict_yaml.fields import Section

START = "<!-- Below: python -m maestro_scale.datasets.description.reference -->"
_ROOT = Path(__file__).parents[3]
PAGE, SCHEMA = _ROOT / "docs" / "description.md", _ROOT / "descriptions" / "description.schema.json"

# Sections in the order of the page: (where it is in a document, its model, the model whose keys it shares).
_SECTIONS: tuple[tuple[str, type[Section], type[Section] | None], ...] = (
    ("", Description, None),
    ("rasters.NAME", Raster, ImageFiles),
    ("rasters.NAME.bands[i]", Band, None),
    ("rasters.NAME.masks.NAME", MaskRule, ImageFiles),
    ("rasters.NAME.sensor", SensorPreset, None),
    ("rasters.NAME.sensor.scale", SensorScale, None),
    ("sensors.NAME", FurtherSensor, SensorPreset),
    ("Files with images", ImageFiles, None),
    ("dates", Dates, None),
    ("targets.NAME", Target, None),
    ("targets.NAME.raster", RasterTarget, ImageFiles),
    ("targets.NAME.vector", VectorTarget, None),
    ("targets.NAME.table", TableTarget, None),
    ("splits", Splits, None),
    ("splits.lists", SplitLists, None),
    ("splits.column", SplitColumn, None),
    ("splits.blocks", SplitBlocks, None),
    ("grid", Grid, None),
    ("grid.area", Area, None),
)
_SHORT = {"Band": "string", "Dates": "string", "Area": "string"}
"""Sections that a document may give as one text."""


def schema() -> dict[str, Any]:
    """The JSON schema of descriptions, with ``extends`` and the short forms: one value where a list is expected, the
    name of a band, the kind of dates, the file of an area."""
    found = Description.model_json_schema()
    required = found.pop("required")
    for definition in found["$defs"].values():
        # A document with ``extends`` gives only what differs.
        definition.pop("required", None)
    found = _with_short_forms(found)
    found["properties"]["extends"] = {
        "type": "string",
        "description": "Path of another description, relative to this file: keys of this file replace its keys.",
    }
    found["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _with_short_forms(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_short_forms(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _with_short_forms(value) for key, value in node.items()}
    if node.get("type") == "array" and "items" in node:
        keys = {k: node.pop(k) for k in ("title", "description", "default") if k in node}
        return {**keys, "anyOf": [node, node["items"]]}
    name = str(node.get("$ref", "")).rpartition("/")[2]
    if name in _SHORT:
        keys = {k: v for k, v in node.items() if k != "$ref"}
        return {**keys, "anyOf": [{"$ref": node["$ref"]}, {"type": _SHORT[name]}]}
    return node


def tables() -> str:
    """All keys with their types, defaults and meanings, a table per section, as Markdown."""
    parts = []
    for where, model, shared in _SECTIONS:
        title = f"`{where}`" if "." in where or where in ("splits", "grid", "dates") else where or "Top level"
        rows = "\n".join(_rows(model, shared))
        notes = f"\n\nAnd the keys of [{_title(shared)}](#{_anchor(shared)})." if shared else ""
        text = " ".join((model.__doc__ or "").split())
        head = "| key | value | default | meaning |\n|---|---|---|---|"
        parts.append(f"### {title}\n\n{_markdown(text)}\n\n{head}\n{rows}{notes}\n")
    return "\n".join(parts)


def _rows(model: type[Section], shared: type[Section] | None) -> Iterator[str]:
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        key = field.alias or name
        if shared is not None and name in shared.model_fields and name not in model.__annotations__:
            continue
        default = "required" if field.is_required() else _default(properties[key].get("default"))
        meaning = _markdown(" ".join((field.description or "").split()))
        yield f"| `{key}` | {_type(properties[key])} | {default} | {meaning} |"


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if "$ref" in node:
        return _reference(node["$ref"])
    if "allOf" in node:
        return _type(node["allOf"][0])
    if "anyOf" in node:
        return " or ".join(_type(option) for option in node["anyOf"] if option.get("type") != "null")
    if node.get("type") == "array":
        if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])}"
        return f"list of {_type(node['items'])}"
    if node.get("type") == "object":
        values = node.get("additionalProperties")
        return f"mapping of names to {_type(values)}" if isinstance(values, dict) else "mapping"
    return {"string": "text", "number": "number", "integer": "whole number", "boolean": "true or false"}.get(
        str(node.get("type")), "value"
    )


def _reference(ref: str) -> str:
    name = ref.rpartition("/")[2]
    model = next((m for _, m, _ in _SECTIONS if m.__name__ == name), None)
    return f"[{_title(model)}](#{_anchor(model)})" if model else "text"


def _title(model: type[Section] | None) -> str:
    where = next(w for w, m, _ in _SECTIONS if m is model)
    return where or "Top level"


def _anchor(model: type[Section] | None) -> str:
    """As GitHub and mkdocs make it of a heading."""
    return re.sub(r"[^a-z0-9 _-]", "", _title(model).lower()).replace(" ", "-")


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "its defaults" if value else "none"
    if value == [] or value == "":
        return "none"
    return f"`{json.dumps(value)}`"


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def main() -> None:
    """Write the tables and the schema again."""
    page = PAGE.read_text()
    PAGE.write_text(f"{page.partition(START)[0]}{START}\n\n{tables()}")
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Kinds of values that several sections have."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    WithJsonSchema,
)

from maestro_scale.strict_yaml.fields import listed

_INTEGER = re.compile(r"[+-]?\d{1,18}")

SourceKind = Literal["geotiff", "netcdf", "hdf5", "zarr", "numpy", "parquet", "webdataset", "stac"]
"""Storage formats; one module each in datasets/sources/."""
Axis = Literal["key", "date", "band", "y", "x"]
QuantityKind = Literal["reflectance", "backscatter_linear", "backscatter_db", "elevation", "image", "any"]
"""What a raster measures; datasets/fill.py has the valid range and the fill values of each."""
Resampling = Literal["nearest", "bilinear", "cubic", "average", "mode"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]{1,100}$")]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Metres = Annotated[float, Field(gt=0)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(listed)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(listed)]


def _band_source(value: Any) -> int | str:
    if (type(value) is int and value >= 1) or (isinstance(value, str) and 0 < len(value) <= 1000):
        return value
    raise ValueError(f"must be the number of a band, from 1, or text, got {value!r}")


# A union would report one error per member.
BandSource = Annotated[
    int | str,
    PlainValidator(_band_source),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "minLength": 1}]}),
]
Index = Annotated[int, Field(ge=0)]
Window = Annotated[tuple[Index, Index], BeforeValidator(listed)]


def numbers(value: Any) -> Any:
    """A number as a list of one."""
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else listed(value)


def is_integer(text: str) -> bool:
    """Whether a label is the value of a pixel."""
    return bool(_INTEGER.fullmatch(text))

"""GeoParquet 1.1 tables (https://geoparquet.org/releases/v1.1.0/): rows with a geometry in longitude and latitude.

Geometries are in OGC:CRS84, the default of the format, whatever the coordinate system of each tile: rows of several
systems, and files of several regions, are one table for geopandas and DuckDB.
"""

from __future__ import annotations

import datetime
import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from maestro_scale.datasets.spec import GeoOrigin

GEO_KEY = "geo"
GEOMETRY = "geometry"
WEIGHTS_KEY = "maestro_scale.weights_sha256"
"""In the metadata of a table: digest of the weights of the model whose embeddings or predictions it has."""


def can_place() -> bool:
    """Whether coordinates can be transformed, for which pyproj is needed (the extra ``geo``)."""
    import importlib.util

    return importlib.util.find_spec("pyproj") is not None


def point(place: GeoOrigin) -> bytes:
    """A point as WKB."""
    (lon,), (lat,) = _lon_lat(place.crs, [place.west_m], [place.north_m])
    return struct.pack("<BIdd", 1, 1, lon, lat)


def square(corner: GeoOrigin, side_m: float) -> bytes:
    """A square with its upper left corner there, as a WKB polygon, counterclockwise.

    One that the antimeridian crosses extends beyond ±180° in the direction of its corner: its bounds stay small, and
    its parts on both sides are one shape.
    """
    west, north = corner.west_m, corner.north_m
    xs = [west, west, west + side_m, west + side_m, west]
    ys = [north, north - side_m, north - side_m, north, north]
    lon, lat = _lon_lat(corner.crs, xs, ys)
    lon = [x + 360 * round((lon[0] - x) / 360) for x in lon]
    ring = [number for pair in zip(lon, lat, strict=True) for number in pair]
    return struct.pack(f"<BIII{len(ring)}d", 1, 3, 1, len(xs), *ring)


def with_geometry(table: pa.Table, shapes: Sequence[bytes | None], kind: str) -> pa.Table:
    """The table with the column ``geometry`` and the metadata of the format. ``kind``: Point or Polygon."""
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": [kind]}
    coordinates = [_coordinates(shape, kind) for shape in shapes if shape is not None]
    if coordinates:
        found = np.concatenate(coordinates)
        column["bbox"] = [*found.min(axis=0).tolist(), *found.max(axis=0).tolist()]
    record = {"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}
    table = table.append_column(pa.field(GEOMETRY, pa.binary()), pa.array(shapes, pa.binary()))
    metadata = {**(table.schema.metadata or {}), GEO_KEY.encode(): json.dumps(record).encode()}
    return table.replace_schema_metadata(metadata)


def _coordinates(shape: bytes, kind: str) -> np.ndarray:
    return np.frombuffer(shape, "<f8", offset=5 if kind == "Point" else 13).reshape(-1, 2)


def _lon_lat(crs: str, xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    lon, lat = _transformer(crs).transform(xs, ys)
    return list(lon), list(lat)


@lru_cache(maxsize=64)
def _transformer(crs: str) -> Any:
    from pyproj import Transformer

    return Transformer.from_crs(crs, "OGC:CRS84", always_xy=True)


def dates(days: Sequence[tuple[int, int] | None]) -> pa.Array:
    """Days (year, day of the year) as a column of dates."""
    found = [
        None if day is None else datetime.date(day[0], 1, 1) + datetime.timedelta(day[1] - 1) for day in days
    ]
    return pa.array(found, pa.date32())

"""Nearest neighbours of a tile or a place among embeddings, as ``embed`` and ``predict --embeddings parquet`` write.

By the cosine of vectors, exactly; tables are read in parts, so that they may be larger than memory.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from maestro_scale.datasets.geoparquet import WEIGHTS_KEY
from maestro_scale.errors import shorten
from maestro_scale.inference.errors import InferenceError

_ROWS = 8192
_EARTH_M = 6_371_000.0
_VECTOR, _GEOMETRY = "vector", "geometry"


@dataclass(frozen=True)
class Neighbour:
    """A row of the embeddings. ``similarity``: cosine, from -1 to 1; ``crop``: number on its tile, None: of a window;
    ``shape``: of GeoJSON, in longitude and latitude; None where its place is not known."""

    key: str
    crop: int | None
    similarity: float
    first_date: str | None
    last_date: str | None
    shape: dict[str, Any] | None


def search(folder: Path, query: str, most: int = 12) -> list[Neighbour]:
    """The row that ``query`` names, and the ``most`` rows that are most similar to it, the most similar first.

    ``query``: a tile's key, with ``#<crop>`` one of its crops, or a place, ``<longitude>,<latitude>``; a key comes
    first. InferenceError if there are no embeddings, none of the tile or place, or vectors of several lengths.
    """
    files = _tables(folder)
    place = _place(query)
    wanted = _of_key(files, query)
    if wanted is None and place:
        wanted = _at_place(files, *place)
    if wanted is None:
        what = "a place" if place else "a tile"
        raise InferenceError(
            f"{query!r}: {folder} has no embedding of such {what}; give a key{_examples(files)}, key#crop, or LON,LAT"
        )
    number, vector = wanted[0], _unit(wanted[1])
    if not np.isfinite(vector).all() or not vector.any():
        raise InferenceError(f"{query!r}: its embedding is zero or not a number, and resembles nothing")
    # The row itself, then of equal similarities the first: (is the row, similarity, -order).
    best: list[tuple[bool, float, int, dict[str, Any]]] = []
    order = 0
    for rows, vectors in _parts(files):
        if vectors.shape[1] != len(vector):
            raise InferenceError(
                f"{folder} has vectors of {len(vector)} and of {vectors.shape[1]} numbers, which are of different "
                "models or sensors: give one of its files"
            )
        cosines = _unit(vectors) @ vector
        least = best[0][1] if len(best) > most else -math.inf
        itself = np.arange(order, order + len(vectors)) == number
        for i in np.flatnonzero((cosines > least) | itself).tolist():
            entry = (bool(itself[i]), float(cosines[i]), -(order + i), rows.slice(i, 1).to_pylist()[0])
            heapq.heappush(best, entry) if len(best) <= most else heapq.heappushpop(best, entry)
        order += len(vectors)
    found = sorted(best, key=lambda entry: entry[:3], reverse=True)
    return [_neighbour(row, similarity) for _, similarity, _, row in found]


def geojson(neighbours: Sequence[Neighbour]) -> str:
    """The neighbours as a collection of features (RFC 7946); a feature without a place has no geometry."""
    features = [
        {
            "type": "Feature",
            "geometry": n.shape,
            "properties": {
                "key": n.key,
                "crop": n.crop,
                "rank": rank,
                "similarity": round(n.similarity, 6),
                "first_date": n.first_date,
                "last_date": n.last_date,
            },
        }
        for rank, n in enumerate(neighbours)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, indent=1)


def _tables(folder: Path) -> list[Path]:
    files = [folder] if folder.is_file() else sorted(p for p in folder.glob("*.parquet"))
    if not files:
        raise InferenceError(f"{folder} has no Parquet files: write them with `maestro-scale embed`")
    first_of: dict[bytes, Path] = {}  # by digest of the weights
    for file in files:
        try:
            schema = parquet.read_schema(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise InferenceError(f"{file}: is no Parquet file ({error}); write it again") from None
        if _VECTOR not in schema.names or "key" not in schema.names:
            raise InferenceError(f"{file} has no vectors: write embeddings with --what vector")
        weights = (schema.metadata or {}).get(WEIGHTS_KEY.encode())
        if weights is not None:  # of earlier revisions: not known
            first_of.setdefault(weights, file)
    if len(first_of) > 1:
        one, other, *_ = first_of.values()
        raise InferenceError(
            f"{folder} has embeddings of different models ({one.name}, {other.name}), whose vectors cannot be "
            "compared: give one file, or a folder per model"
        )
    return files


def _parts(files: Sequence[Path]) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """(rows without vectors, vectors (N, F) float32) of the tables, in order."""
    for file in files:
        with parquet.ParquetFile(file) as table:
            names = [
                n
                for n in ("key", "crop", "first_date", "last_date", _GEOMETRY)
                if n in table.schema_arrow.names
            ]
            for batch in table.iter_batches(_ROWS, columns=[*names, _VECTOR]):
                column = batch.column(_VECTOR)
                flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
                yield batch.select(names), flat.reshape(len(batch), -1)


def _place(query: str) -> tuple[float, float] | None:
    try:
        lon, lat = (float(part) for part in query.split(","))
    except ValueError:
        return None
    return (lon, lat) if -180 <= lon <= 180 and -90 <= lat <= 90 else None


def _of_key(files: Sequence[Path], query: str) -> tuple[int, np.ndarray] | None:
    """(number of the row, vector) of a key; of its first crop, unless the query names another."""
    name, mark, crop = query.rpartition("#")
    order = 0
    for rows, vectors in _parts(files):
        keys = rows.column("key").to_pylist()
        crops = rows.column("crop").to_pylist() if "crop" in rows.schema.names else [None] * len(keys)
        for i, key in enumerate(keys):
            if key == query or (mark and key == name and str(crops[i]) == crop):
                return order + i, vectors[i]
        order += len(keys)
    return None


def _examples(files: Sequence[Path]) -> str:
    """Some of the keys that there are, for messages."""
    keys: list[str] = next((rows.column("key").to_pylist() for rows, _ in _parts(files)), [])
    return f" such as {' or '.join(map(shorten, list(dict.fromkeys(keys))[:3]))}" if keys else ""


def _at_place(files: Sequence[Path], lon: float, lat: float) -> tuple[int, np.ndarray] | None:
    """(number, vector) of the row whose middle is nearest to a place, if that is in its tile, or nearer than two
    tiles."""
    best, nearest, reach = None, math.inf, 0.0
    order = 0
    for rows, vectors in _parts(files):
        shapes = rows.column(_GEOMETRY).to_pylist() if _GEOMETRY in rows.schema.names else []
        for i, shape in enumerate(shapes):
            if shape is None:
                continue
            ring = _ring(shape)
            middle = ring[:4].mean(axis=0)
            distance = _distance_m(lon, lat, *middle)
            if distance < nearest:
                nearest, best = distance, (order + i, vectors[i])
                reach = 2 * max(_distance_m(*middle, *corner) for corner in ring) if len(ring) > 1 else 5000.0
        order += len(vectors)
    return best if nearest <= reach else None


def _ring(shape: bytes) -> np.ndarray:
    """Coordinates (N, 2) of a point, or of the ring of a polygon, as ``datasets/geoparquet.py`` writes them."""
    start = {b"\x01\x01": 5, b"\x01\x03": 13}.get(shape[:2], len(shape))
    if start + 16 > len(shape) or (len(shape) - start) % 16:
        raise InferenceError(
            "a geometry is neither a point nor a polygon of one ring; write the embeddings again"
        )
    return np.frombuffer(shape, "<f8", offset=start).reshape(-1, 2)


def _distance_m(lon: float, lat: float, other_lon: float, other_lat: float) -> float:
    a, b = math.radians(lat), math.radians(other_lat)
    half = (
        math.sin((a - b) / 2) ** 2
        + math.cos(a) * math.cos(b) * math.sin(math.radians(lon - other_lon) / 2) ** 2
    )
    return 2 * _EARTH_M * math.asin(min(math.sqrt(half), 1.0))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: np.ndarray = vectors / np.maximum(lengths, 1e-12)
    return unit


def _neighbour(row: dict[str, Any], similarity: float) -> Neighbour:
    shape = row.get(_GEOMETRY)
    days = [row.get(name) for name in ("first_date", "last_date")]
    first, last = (day and day.isoformat() for day in days)
    return Neighbour(row["key"], row.get("crop"), similarity, first, last, shape and _geojson_shape(shape))


def _geojson_shape(shape: bytes) -> dict[str, Any]:
    ring = _ring(shape).round(8).tolist()
    return (
        {"type": "Point", "coordinates": ring[0]}
        if len(ring) == 1
        else {"type": "Polygon", "coordinates": [ring]}
    )

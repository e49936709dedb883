"""Files with labels: vector files, tables, lists of splits. What their columns are is guessed from names and values."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from maestro_scale import untrusted
from maestro_scale.datasets.describe import words
from maestro_scale.datasets.description.vectors import driver_of
from maestro_scale.datasets.sources.local_file import LocalFile

VECTOR_SUFFIXES = (".gpkg", ".geojson", ".shp")
TABLE_SUFFIXES = (".csv", ".parquet")
_MAX_ROWS = 200_000
_MAX_CLASSES = 64
_MAX_BYTES = 64 * 2**20
_IDS = re.compile(r"(?:.*_)?(?:fid|id|gid|uid|uuid|objectid|ogc_fid|index|no|nr|num|number)", re.IGNORECASE)
_NO_LABELS = re.compile(
    r"split.*|fold.*|set|subset|date|day|time|year|month|area|area_m2|length|perimeter|shape_.*|x|y|lon|lat|longitude"
    r"|latitude|easting|northing|geometry|geom|bounds|remarks?|comments?|source|cloud.*|path|file.*|image|name_?\d*",
    re.IGNORECASE,
)
_CLASS_NAMES = re.compile(
    r".*(?:class|label|type|kind|categor|crop|species|genus|cover|lulc|landuse|use|code|klasse|culture|kultur|art)s?.*",
    re.IGNORECASE,
)
_DATE_NAMES = re.compile(r".*(?:date|day|acquired|acquisition|flight|time).*", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """A column of a table, or an attribute of features. ``kind``: "classes" (``values`` → how often), "number" or
    "text"; ``low`` and ``high``: of numbers."""

    name: str
    kind: str
    values: Mapping[str, int]
    is_text: bool
    low: float = 0.0
    high: float = 0.0
    is_integer: bool = False


@dataclass(frozen=True)
class Vector:
    """A vector file and the layer that is used of it. ``layers``: all that have a geometry."""

    path: str
    layer: str | None
    layers: tuple[str, ...]
    geometry: str
    num_features: int
    crs: str | None
    columns: tuple[Column, ...]

    @property
    def is_area(self) -> bool:
        """Whether it looks like an area of interest: by its name, or few polygons without attributes."""
        named = words.role_of(tuple(re.findall(r"[A-Za-z0-9]+", Path(self.path).stem))) == "area"
        return self.is_polygons and (named or (self.num_features <= 3 and self.label is None))

    @property
    def is_polygons(self) -> bool:
        return "olygon" in self.geometry or self.geometry == "Unknown"

    @property
    def label(self) -> Column | None:
        """The attribute that is most likely the label."""
        return best_label(self.columns)


@dataclass(frozen=True)
class Table:
    """A table with a row per tile. ``key``: its column with the keys of tiles (or None), of ``num_matched`` tiles."""

    path: str
    num_rows: int
    columns: tuple[Column, ...]
    key: str | None
    num_matched: int = 0

    @property
    def split(self) -> Column | None:
        """The column whose values are names of splits."""
        return next(
            (c for c in self.columns if c.values and {v.lower() for v in c.values} <= set(words.SPLITS)), None
        )

    @property
    def date(self) -> Column | None:
        """The column that is called as if it had dates."""
        return next((c for c in self.columns if c.name != self.key and _DATE_NAMES.fullmatch(c.name)), None)

    @property
    def labels(self) -> list[Column]:
        """Columns that may be labels: classes, or numbers."""
        return [c for c in self.columns if c.name != self.key and c is not self.split and _may_be_label(c)]


def best_label(columns: Sequence[Column]) -> Column | None:
    """Of columns that may be labels, one that is called so, else one of text, else the first."""
    classes = [c for c in columns if c.kind == "classes" and _may_be_label(c)]
    named = [c for c in classes if _CLASS_NAMES.fullmatch(c.name)]
    texts = [c for c in named if c.is_text] or named or [c for c in classes if c.is_text] or classes
    return texts[0] if texts else None


def is_called_a_label(column: Column) -> bool:
    """Whether the last part of its name says so."""
    return bool(_CLASS_NAMES.fullmatch(column.name.rpartition("/")[2]))


def _may_be_label(column: Column) -> bool:
    if _NO_LABELS.fullmatch(column.name) or _IDS.fullmatch(column.name):
        return False
    return column.kind == "number" or (column.kind == "classes" and len(column.values) > 1)


def read_vector(file: LocalFile, path: str) -> Vector | str:
    """What a vector file holds, which is ``path`` in the folder, or why it cannot be read."""
    if path.lower().endswith(".parquet"):
        return _read_geoparquet(file.path, path)
    import pyogrio

    try:
        driver_of(file)  # GDAL has drivers for files that name others, whatever their suffix
        layers = [str(name) for name, geometry in pyogrio.list_layers(file.path) if geometry]
        if not layers:
            return "has no layer with a geometry"
        infos = {name: pyogrio.read_info(file.path, layer=name) for name in layers}
        layer = max(
            layers, key=lambda name: (infos[name]["features"] > 0, best_of(file.path, name) is not None)
        )
        info = infos[layer]
        return Vector(
            path=path,
            layer=layer if len(layers) > 1 else None,
            layers=tuple(layers),
            geometry=str(info["geometry_type"]),
            num_features=int(info["features"]),
            crs=info["crs"],
            columns=_frame_columns(file.path, layer),
        )
    except Exception as error:  # noqa: BLE001 - GDAL's drivers raise errors of many kinds for damaged files
        return _one_line(error)


def best_of(path: Path, layer: str) -> Column | None:
    """The label of a layer."""
    return best_label(_frame_columns(path, layer))


def _frame_columns(path: Path, layer: str) -> tuple[Column, ...]:
    import pyogrio

    frame = pyogrio.read_dataframe(path, layer=layer, read_geometry=False, max_features=_MAX_ROWS)
    return tuple(column_of(str(name), frame[name].dropna().tolist()) for name in frame.columns)


def _read_geoparquet(location: Path, path: str) -> Vector | str:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(location)
        meta = untrusted.load_json((file.schema_arrow.metadata or {})[b"geo"], path)
        main = meta["columns"][meta["primary_column"]]
        names = [n for n in file.schema_arrow.names if n not in meta["columns"]]
        rows: list[dict[str, Any]] = []
        for batch in file.iter_batches(batch_size=65_536, columns=names):
            rows += batch.to_pylist()
            if len(rows) >= _MAX_ROWS:
                break
        crs = main.get("crs", {"name": "longitude and latitude"})  # null: unknown
        identifier = (crs or {}).get("id")
        name = f"{identifier['authority']}:{identifier['code']}" if identifier else (crs or {}).get("name")
        return Vector(
            path=path,
            layer=None,
            layers=(),
            geometry=" ".join(map(str, main.get("geometry_types", []))) or "Unknown",
            num_features=file.metadata.num_rows,
            crs=None if crs is None else str(name),
            columns=tuple(column_of(n, [r[n] for r in rows if r[n] is not None]) for n in names),
        )
    except Exception as error:  # noqa: BLE001 - metadata of any form
        return _one_line(error)


def is_geoparquet(file: BinaryIO) -> bool:
    """Whether a Parquet file has geometries."""
    import pyarrow.parquet as pq

    try:
        return b"geo" in (pq.read_schema(file).metadata or {})
    except Exception:  # noqa: BLE001 - not a Parquet file; who reads it next says so
        return False


def read_table(file: LocalFile, path: str, keys: Iterable[str]) -> Table | str:
    """A CSV or Parquet file and which of its columns has most of ``keys``, or why it cannot be read."""
    try:
        names, rows = _read_rows(file.path)
    except Exception as error:  # noqa: BLE001 - as above
        return _one_line(error)
    if not names or not rows:
        return "has no rows"
    wanted = set(keys)
    best, matched = None, 0
    columns = []
    for i, name in enumerate(names):
        values = [row[i] for row in rows if row[i] not in (None, "")]
        columns.append(column_of(name, values))
        found = {stem for v in set(map(str, values)) for stem in (v, Path(v).stem) if stem in wanted}
        if len(found) > matched:
            best, matched = name, len(found)
    return Table(path, len(rows), tuple(columns), best, matched)


def _read_rows(path: Path) -> tuple[list[str], list[list[Any]]]:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        simple = [
            f.name
            for f in file.schema_arrow
            if not str(f.type).startswith(("binary", "list", "struct", "large_b"))
        ]
        rows: list[list[Any]] = []
        for batch in file.iter_batches(batch_size=65_536, columns=simple):
            rows += [list(row.values()) for row in batch.to_pylist()]
            if len(rows) >= _MAX_ROWS:
                break
        return simple, rows
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES).decode("utf-8-sig", "replace")
    head = content[:4096].splitlines()[0] if content else ""
    delimiter = max(",;\t", key=head.count)
    lines = [row for row in csv.reader(io.StringIO(content, newline=""), delimiter=delimiter) if row]
    if not lines:
        return [], []
    names = [name.strip() for name in lines[0]]
    return names, [[c.strip() for c in row] for row in lines[1 : _MAX_ROWS + 1] if len(row) == len(names)]


def list_keys(file: LocalFile) -> list[str]:
    """The lines of a text file, or the first column of a CSV."""
    with file.path.open("rb") as opened:
        text = opened.read(_MAX_BYTES).decode("utf-8-sig", "replace")
    return [re.split(r"[,;\t]", line)[0].strip() for line in text.splitlines() if line.strip()][:_MAX_ROWS]


def column_of(name: str, values: Sequence[Any]) -> Column:
    """What the values of a column are, without those that are missing."""
    numbers = _numbers(values)
    texts = Counter(str(v) for v in values[:_MAX_ROWS])
    few = 0 < len(texts) <= _MAX_CLASSES and (len(texts) * 2 <= len(values) or len(texts) <= 3)
    counts = dict(sorted(texts.items(), key=lambda item: _natural(item[0]))) if few else {}
    if numbers is None:
        return Column(name, "classes" if few else "text", counts, is_text=True)
    integer = all(n == int(n) for n in numbers)
    kind = "classes" if few and integer else "number"
    if kind == "number":
        counts = {}
    elif not all(isinstance(v, str) for v in values):  # 3.0 of a column with gaps is 3
        counts = {str(int(float(k))): n for k, n in counts.items()}
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 0.0)
    return Column(name, kind, counts, is_text=False, low=low, high=high, is_integer=integer)


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """The values as finite numbers, or None if one is not."""
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        return None
    return numbers if numbers and all(abs(n) < 1e300 for n in numbers) else None


def _natural(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

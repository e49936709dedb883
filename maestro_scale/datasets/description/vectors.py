"""Features of vector files: areas of interest, and labels that are rasterised.

GeoPackage, GeoJSON, GeoParquet and Shapefile. Suffix and first bytes must agree before GDAL opens a file, since GDAL
has drivers for files that name other files and addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.scenes.grid import Box, parse_crs
from maestro_scale.datasets.scenes.ground import is_on_earth
from maestro_scale.datasets.scenes.warp import tile_transform, transformed_bounds, transformer
from maestro_scale.datasets.sources.local_file import LocalFile
from maestro_scale.datasets.spec import DatasetError

_SQLITE = b"SQLite format 3\x00"
_PARQUET = b"PAR1"
_DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".json": "GeoJSON", ".shp": "ESRI Shapefile"}
FORMATS = "GeoPackage (.gpkg), GeoJSON (.geojson), GeoParquet (.parquet) or Shapefile (.shp)"

IN_MEMORY_BYTES = 64 * 2**20
"""A GeoPackage larger than this is read by rectangles, through its spatial index, instead of as a whole."""


@dataclass(frozen=True)
class Features:
    """Features in one coordinate system. ``labels``: as they are in the file; None without a column."""

    geometries: np.ndarray  # (N,) shapely
    labels: np.ndarray | None  # (N,) object

    def __len__(self) -> int:
        return len(self.geometries)

    def selected(self, which: np.ndarray) -> Features:
        """Those of a mask or of indices."""
        return Features(self.geometries[which], None if self.labels is None else self.labels[which])


class VectorFile:
    """The features of one layer of a file, by rectangle, in the coordinate system ``crs``.

    Picklable: what it has read stays in the process, as does the copy of a remote file. ``file_crs``: of a file that
    declares none. DatasetError that names file and cause.
    """

    def __init__(
        self,
        address: str,
        crs: str,
        *,
        layer: str | None = None,
        column: str | None = None,
        order: str | None = None,
        file_crs: str | None = None,
    ) -> None:
        self.address, self.crs, self.column, self._order = address, crs, column, order
        self._local: LocalFile | None = None
        self._driver = driver_of(self._file)
        self._layer = _layer(self._file, layer) if self._driver == "GPKG" else None
        self._columns = tuple(dict.fromkeys(c for c in (column, order) if c is not None))
        self.file_crs = self._check_header(file_crs)
        self._whole = self._driver != "GPKG" or self._file.path.stat().st_size <= IN_MEMORY_BYTES
        self._loaded: tuple[Box | None, Features, Any] | None = None

    def within(self, box: Box) -> Features:
        """The features that touch a box, in the order in which they are drawn."""
        if self._loaded is None or not (self._loaded[0] is None or _contains(self._loaded[0], box)):
            self.load(None if self._whole else box)
        assert self._loaded is not None
        _, features, tree = self._loaded
        import shapely

        found = np.sort(tree.query(shapely.box(*box)))
        return features.selected(found)

    def reaches(self, box: Box) -> bool:
        """Whether the extent of all features, by the file's header, has a common point with a box.

        True where the header does not say, and where the box has no place in the file's coordinate system."""
        import pyogrio

        here = transformed_bounds(self.crs, self.file_crs, box)
        if self._driver == "Parquet" or here is None:
            return True
        found = pyogrio.read_info(self._file.path, layer=self._layer, force_total_bounds=True)["total_bounds"]
        if found is None or not np.isfinite(found).all():
            return True
        west, south, east, north = found
        return bool(west <= here.east and east >= here.west and south <= here.north and north >= here.south)

    def load(self, box: Box | None) -> None:
        """Read all features, or those of a box, into memory; :meth:`within` then reads no file for boxes in it."""
        import shapely

        features = self._read(box)
        self._loaded = (box, features, shapely.STRtree(features.geometries))

    def prepare(self, box: Box) -> None:
        """Read the features of a box, of which parts are needed next."""
        if not self._whole:
            self.load(box)

    def _read(self, box: Box | None) -> Features:
        import pyproj
        import shapely

        bounds = None if box is None else transformed_bounds(self.crs, self.file_crs, box)
        table = self._table(None if bounds is None else tuple(bounds))
        geometries = shapely.force_2d(np.asarray(table["geometry"], object))
        valid = ~(shapely.is_missing(geometries) | shapely.is_empty(geometries))
        geometries = geometries[valid]
        if self.file_crs != self.crs:
            move = transformer(self.file_crs, self.crs)
            try:
                geometries = shapely.transform(
                    geometries, lambda xy: np.stack(move.transform(xy[:, 0], xy[:, 1]), 1)
                )
            except pyproj.exceptions.ProjError as error:
                raise DatasetError(
                    f"{self.address}: cannot be transformed to {self.crs} ({error})"
                ) from error
            near = np.isfinite(shapely.bounds(geometries)).all(axis=1)
            geometries, valid = geometries[near], np.flatnonzero(valid)[near]
        labels = None if self.column is None else np.asarray(table[self.column], object)[valid]
        if self._order is not None:
            order = _in_order(np.asarray(table[self._order], object)[valid], f"{self.address}: {self._order}")
            geometries, labels = geometries[order], None if labels is None else labels[order]
        return Features(geometries, labels)

    def _table(self, bounds: tuple[float, ...] | None) -> Mapping[str, Any]:
        """Columns by name, and ``geometry``."""
        import pyarrow
        import pyogrio
        import shapely

        try:
            if self._driver == "Parquet":
                import pyarrow.parquet as pq

                name = _geometry_column(self._file)
                table = pq.read_table(self._file.path, columns=[name, *self._columns])
                columns = {c: table[c].to_pandas().to_numpy(object) for c in self._columns}
                return {"geometry": shapely.from_wkb(table[name].to_numpy(zero_copy_only=False)), **columns}
            _, _, geometry, fields = pyogrio.raw.read(
                self._file.path,
                layer=self._layer,
                columns=list(self._columns),
                bbox=bounds,
                force_2d=True,
            )
            found = pyogrio.read_info(self._file.path, layer=self._layer)["fields"].tolist()
            names = [n for n in found if n in self._columns]
            return {"geometry": shapely.from_wkb(geometry), **dict(zip(names, fields, strict=True))}
        except (pyarrow.ArrowException, OSError, ValueError, shapely.errors.ShapelyError) as error:
            raise _unreadable(self._file, error) from error
        except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
            raise _unreadable(self._file, error) from error

    @property
    def _file(self) -> LocalFile:
        if self._local is None:
            self._local = LocalFile(self.address)
        return self._local

    def _check_header(self, file_crs: str | None) -> str:
        """The coordinate system of the file; DatasetError if it has none, or lacks a column."""
        if self._driver == "Parquet":
            columns, crs = _parquet_header(self._file)
        else:
            columns, crs = _ogr_header(self._file, self._layer)
        for column in self._columns:
            if column not in columns:
                raise DatasetError(
                    f"{self.address}: has no column {column!r}; there are: {', '.join(columns[:50]) or 'none'}",
                    "a column is missing",
                )
        if crs is None and file_crs is None:
            raise DatasetError(
                f"{self.address}: has no coordinate system; give it by crs, beside the name of the file",
                "CRS is missing",
            )
        found = parse_crs(crs or file_crs, self.address)
        if not is_on_earth(found):
            raise DatasetError(
                f"{self.address}: is in a local coordinate system, which says nothing of where on Earth it lies; "
                "georeference it",
                "no place on the ground",
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None, "_local": None}


def _in_order(ranks: np.ndarray, where: str) -> list[int]:
    """Indices that sort features by a column, those without a value first, equal ones in their order."""
    values: list[Any] = [None if rank is None or rank != rank else rank for rank in ranks.tolist()]
    known = [i for i, value in enumerate(values) if value is not None]
    try:
        known.sort(key=values.__getitem__)
    except TypeError as error:
        raise DatasetError(f"{where}: has no order ({error}); use a column of numbers") from error
    return [i for i, value in enumerate(values) if value is None] + known


def burn(
    features: Features,
    values: np.ndarray,
    box: Box,
    size: int,
    *,
    outside: float,
    all_touched: bool,
    dtype: Literal["uint8", "float32"],
) -> np.ndarray:
    """(size, size): the value of the last feature at each pixel, ``outside`` where there is none. Row 0 is north."""
    from rasterio.features import rasterize
    from rasterio.transform import Affine

    target = np.full((size, size), outside, dtype)
    if len(features):
        shapes = zip(features.geometries.tolist(), values.tolist(), strict=True)
        rasterize(shapes, out=target, transform=Affine(*tile_transform(box, size)), all_touched=all_touched)
    return target


def read_area(address: str, crs: str, layer: str | None = None, file_crs: str | None = None) -> Any:
    """The union of all polygons of a file, in ``crs``. DatasetError if it has none."""
    import shapely

    features = VectorFile(address, crs, layer=layer, file_crs=file_crs)
    features.load(None)
    assert features._loaded is not None
    shapes = features._loaded[1].geometries
    polygons = shapes[np.isin(shapely.get_type_id(shapes), (3, 6))]
    if not len(polygons):
        raise DatasetError(
            f"{address}: has no polygon among {len(shapes)} features; an area is made of polygons"
        )
    return shapely.union_all(shapely.make_valid(polygons))


def driver_of(file: LocalFile) -> str:
    """The driver for a vector file; DatasetError unless suffix and first bytes say the same format."""
    try:
        with file.path.open("rb") as opened:
            start = opened.read(len(_SQLITE))
    except OSError as error:
        raise DatasetError(
            f"{file.address}: cannot be read ({error.strerror}); check the path", "a file is missing"
        ) from error
    suffix = file.path.suffix.lower()
    driver = "Parquet" if start.startswith(_PARQUET) else _DRIVERS.get(suffix)
    right = {
        "Parquet": True,
        "GPKG": start == _SQLITE,
        "GeoJSON": start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"),
        "ESRI Shapefile": start.startswith(b"\x00\x00\x27\x0a"),
    }
    if driver is None or not right[driver]:
        raise DatasetError(f"{file.address}: is not a vector file of a known format; use {FORMATS}")
    return driver


def _layer(file: LocalFile, wanted: str | None) -> str:
    import pyogrio

    try:
        layers = [str(name) for name in pyogrio.list_layers(file.path)[:, 0]]
    except (pyogrio.errors.DataSourceError, OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if wanted is None and len(layers) == 1:
        return layers[0]
    if wanted not in layers:
        what = f"has no layer {wanted!r}" if wanted else f"has {len(layers)} layers; set layer"
        raise DatasetError(f"{file.address}: {what}; there are: {', '.join(layers[:50])}")
    return str(wanted)


def _ogr_header(file: LocalFile, layer: str | None) -> tuple[list[str], Any]:
    import pyogrio

    try:
        info = pyogrio.read_info(file.path, layer=layer)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    return [str(f) for f in info["fields"]], info["crs"]


def _parquet_header(file: LocalFile) -> tuple[list[str], Any]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error
    return schema.names, _geo_metadata(file)[1]


def _geometry_column(file: LocalFile) -> str:
    return _geo_metadata(file)[0]


def _geo_metadata(file: LocalFile) -> tuple[str, Any]:
    """Name and CRS of the geometry column: the ``geo`` metadata of GeoParquet (geoparquet.org/releases/v1.1.0).

    Without a ``crs``, it is longitude and latitude (OGC:CRS84); null means unknown.
    """
    import pyarrow.parquet as pq
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    raw = (pq.read_schema(file.path).metadata or {}).get(b"geo")
    if raw is None:
        raise DatasetError(
            f"{file.address}: is a Parquet file without geometries (no `geo` metadata); use {FORMATS}"
        )
    try:
        content = untrusted.load_json(raw, file.address)
    except untrusted.InputError as error:
        raise DatasetError(f"{file.address}: has invalid `geo` metadata ({error})") from error
    try:
        name = str(content["primary_column"])
        column = content["columns"][name]
        encoding = str(column["encoding"])
        crs = column.get("crs", "OGC:CRS84")
        if isinstance(crs, dict):  # PROJJSON
            crs = CRS.from_json_dict(crs).to_wkt()
    except (KeyError, TypeError, AttributeError, CRSError) as error:
        raise DatasetError(
            f"{file.address}: has incomplete `geo` metadata ({error}); write the file again"
        ) from error
    if encoding != "WKB":
        raise DatasetError(
            f"{file.address}: has geometries encoded as {encoding}, not WKB; write the file again"
        )
    return name, crs


def _unreadable(file: LocalFile, error: Exception) -> DatasetError:
    return DatasetError(
        f"{file.address}: cannot be read ({' '.join(str(error).split())}); fetch the file again"
    )


def _contains(outer: Box, inner: Box) -> bool:
    return (
        outer.west <= inner.west
        and outer.south <= inner.south
        and outer.east >= inner.east
        and outer.north >= inner.north
    )

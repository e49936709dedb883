"""Files that hold arrays, rather than one image: NetCDF, HDF5, Zarr, NumPy, Parquet, tars and STAC.

Each format is read far enough to list its arrays; what their axes are follows from their names or shapes. What cannot
be known is assumed, and said.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets import raw
from maestro_scale.datasets.describe.probe import Values, spread_of
from maestro_scale.datasets.describe.units import METRES_PER_DEGREE, unit_of
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.array_image import StoredArray
from maestro_scale.datasets.sources.arrays import ArrayFile
from maestro_scale.datasets.sources.table import source_of
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import MaestroError

SUFFIXES = (".nc", ".nc4", ".h5", ".hdf5", ".he5", ".zarr", ".zarr.zip", ".npy", ".npz", ".parquet", ".tar")
_AXES = {
    "key": (
        "key",
        "sample",
        "samples",
        "tile",
        "tiles",
        "patch",
        "patches",
        "id",
        "n",
        "batch",
        "place",
        "location",
    ),
    "date": ("time", "date", "dates", "times", "t", "step", "month", "doy", "datetime"),
    "band": (
        "band",
        "bands",
        "channel",
        "channels",
        "c",
        "wavelength",
        "polarization",
        "polarisation",
        "variable",
    ),
    "y": ("y", "lat", "latitude", "northing", "row", "rows", "height", "h", "nj"),
    "x": ("x", "lon", "longitude", "easting", "col", "cols", "column", "width", "w", "ni"),
}
_MAX_ARRAYS = 40
_MIN_SIDE = 6  # pixels: smaller arrays are no images
_MANY = 64  # along an unnamed first axis: more than that are tiles, fewer are dates
_SAMPLE_BYTES = 64 * 2**20
_MAX_COORDINATE = 1_000_000
_KEY_NAMES = ("key", "id", "name", "tile", "metadata")


@dataclass(frozen=True)
class Array:
    """One array of a file. ``axes``: of the description; ``named``: whether the file names them."""

    variable: str | None
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    named: bool
    values: Values | None = None
    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    resolution_m: float | None = None
    crs: str | None = None
    bounds: tuple[float, float, float, float] | None = None
    band_names: tuple[str, ...] = ()
    dates: str | None = None  # name of the coordinate with dates
    keys: str | None = None  # name of what holds the keys of tiles
    source: str | None = None

    def size(self, axis: str) -> int:
        """Length along an axis; 1 if it has none."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1


@dataclass
class _Sample:
    """An array without its values, and how to read some of them. ``extra``: further fields of :class:`Array`."""

    variable: str | None
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]
    extra: dict[str, Any] = field(default_factory=dict)


def suffix_of(path: str) -> str | None:
    """Which of :data:`SUFFIXES` a path has, the longest."""
    found = [s for s in SUFFIXES if path.lower().endswith(s)]
    return max(found, key=len) if found else None


def read_arrays(src: str, path: str) -> list[Array] | str:
    """The arrays of a file below ``src`` that may be images, or why it cannot be read."""
    address = remote.join(src, path)
    readers = {".parquet": _parquet, ".tar": _tar}
    reader = readers.get(suffix_of(path) or "", _stored)
    try:
        with reader(address) as samples:
            found = [_array(s) for s in samples[:_MAX_ARRAYS]]
    except MaestroError as error:
        return str(error).removeprefix(f"{address}: ")
    except Exception as error:  # noqa: BLE001 - each library has its own errors for damaged files
        return " ".join(str(error).split())[:200] or type(error).__name__
    arrays = [a for a in found if a is not None]
    return arrays or "holds no arrays that could be images"


def _array(sample: _Sample) -> Array | None:
    if len(sample.shape) < 2 or np.dtype(sample.dtype).kind not in "uif":
        return None
    axes = axes_of(sample.dims, sample.shape)
    if axes is None or min(sample.shape[axes.index(a)] for a in "yx") < _MIN_SIDE:
        return None
    window = tuple(
        slice(0, min(n, {"key": 3, "date": 3, "band": 16}.get(axis, 256)))
        for axis, n in zip(axes, sample.shape, strict=True)
    )
    small = int(np.prod([s.stop for s in window])) * 8 <= _SAMPLE_BYTES
    values = _values_of(np.asarray(sample.read(window)), sample.extra.get("nodata")) if small else None
    return Array(
        sample.variable,
        sample.shape,
        sample.dtype,
        axes,
        bool(_named(sample.dims)),
        values=values,
        **sample.extra,
    )


def axes_of(dims: Sequence[str], shape: Sequence[int]) -> tuple[str, ...] | None:
    """The axes of an array by the names of its dimensions, else by its shape; None if it cannot be one of images."""
    if named := _named(dims):
        return named if {"y", "x"} <= set(named) else None
    count = len(shape)
    if count == 2:
        return ("y", "x")
    last = shape[-1] <= 16 < min(shape[-2], shape[-3])
    spatial: tuple[str, ...] = ("y", "x", "band") if last else ("band", "y", "x")
    if count == 3:
        return spatial
    first = "key" if shape[0] > _MANY else "date"
    return {4: (first, *spatial), 5: ("key", "date", *spatial)}.get(count)


def _named(dims: Sequence[str]) -> tuple[str, ...]:
    """The axes that names of dimensions stand for, or () if one stands for none."""
    axes = [next((axis for axis, names in _AXES.items() if d.lower() in names), "") for d in dims]
    return tuple(axes) if axes and all(axes) and len(set(axes)) == len(axes) else ()


def _values_of(array: np.ndarray, nodata: float | None) -> Values | None:
    invalid = ~np.isfinite(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    if nodata is not None:
        invalid |= array == nodata
    valid = array[~invalid]
    if not valid.size:
        return None
    distinct = np.unique(valid) if valid.dtype.kind in "iu" else None
    labels = tuple(distinct.tolist()) if distinct is not None and len(distinct) <= 256 else None
    return spread_of(valid, float(invalid.mean()), float((valid == 0).mean()), labels)


@contextmanager
def _stored(address: str) -> Iterator[list[_Sample]]:
    """Arrays of NetCDF, HDF5, Zarr and NumPy files, by the sources that will read them."""
    section = ImageFiles(files=address)
    with source_of(section).open_file(address, section) as file:
        assert isinstance(file, ArrayFile)
        store = file.store
        names = list(store.names())[:1000]
        arrays = {n: a for n in names if (a := store.find(n)) is not None}
        yield [_stored_sample(file, arrays, name) for name in sorted(arrays) if len(arrays[name].shape) > 1]


def _stored_sample(file: ArrayFile, arrays: Mapping[str, StoredArray], name: str) -> _Sample:
    array, store = arrays[name], file.store
    dims = tuple(array.dimensions or ())
    extra: dict[str, Any] = {}
    for d in dims:
        beside = arrays.get(store.beside(name, d))
        if beside is None or len(beside.shape) != 1 or d == name:
            continue
        if d.lower() in _AXES["date"]:
            extra["dates"] = d
        elif d.lower() in _AXES["key"]:
            extra["keys"] = d
        elif d.lower() in _AXES["x"] and beside.shape[0] <= _MAX_COORDINATE:
            extra |= _spacing(np.asarray(beside.read((slice(0, beside.shape[0]),))), d)
    if not dims and array.shape[0] > _MANY and len(array.shape) > 3:
        same = [
            n for n, other in arrays.items() if len(other.shape) == 1 and other.shape[0] == array.shape[0]
        ]
        extra["keys"] = next((n for n in same if any(k in n.lower() for k in _KEY_NAMES)), None)
    fill = array.attribute("_FillValue")
    fill = array.attribute("missing_value") if fill is None else fill
    if isinstance(fill, (int, float)) and not isinstance(fill, bool):
        extra["nodata"] = float(fill)
    if {"y", "x"} <= set(axes := _named(dims)):
        extra |= _place(file, name, array.shape[axes.index("y")], array.shape[axes.index("x")])
    # Only one array, such as that of an .npy file, needs no name.
    variable = None if name in ("", "array") and len(arrays) == 1 else name
    return _Sample(variable, tuple(array.shape), str(array.dtype), dims, array.read, extra)


def _place(file: ArrayFile, name: str, height: int, width: int) -> dict[str, Any]:
    """Coordinate system and bounds of an array; nothing where the file does not say both."""
    try:
        found = file.georeference(name)
    except DatasetError:
        return {}
    if found.crs is None or found.transform is None or found.transform[1] or found.transform[3]:
        return {}
    a, _, west, _, e, north = found.transform
    south, east = north + e * height, west + a * width
    return {"crs": found.crs, "bounds": (west, min(south, north), east, max(south, north))}


def _spacing(x: np.ndarray, name: str) -> dict[str, Any]:
    """Pixel size from a coordinate: metres, or degrees if it is called longitude or cannot be metres."""
    if x.ndim != 1 or len(x) < 2 or x.dtype.kind not in "iuf":
        return {}
    step = abs(float(x[-1]) - float(x[0])) / (len(x) - 1)
    degrees = name.lower().startswith("lon") or (np.abs(x).max() <= 360 and step < 0.1)
    return {"resolution_m": float(f"{step * METRES_PER_DEGREE:.2g}") if degrees else round(step, 6)}


@contextmanager
def _parquet(address: str) -> Iterator[list[_Sample]]:
    """Columns with the bytes of image files, in the first row."""
    import pyarrow.parquet as pq

    with remote.open_binary(address) as opened:
        yield _parquet_samples(pq.ParquetFile(opened))


def _parquet_samples(file: Any) -> list[_Sample]:
    names = [f.name for f in file.schema_arrow if str(f.type) in ("binary", "large_binary")]
    texts = [f.name for f in file.schema_arrow if str(f.type) in ("string", "large_string")]
    keys = next((n for n in texts if any(k in n.lower() for k in ("cell", "key", "id", "name"))), None)
    dates = next(
        (f.name for f in file.schema_arrow if any(k in f.name.lower() for k in ("date", "time"))), None
    )
    batch = next(file.iter_batches(batch_size=1, columns=names), None)
    samples = []
    if batch is None or not batch.num_rows:
        return []
    for name in names:
        content = batch.column(name)[0].as_py()
        if content and (image := _image_sample(name, content)) is not None:
            image.extra |= {"keys": keys, "dates": dates}
            samples.append(image)
    return samples


@contextmanager
def _tar(address: str) -> Iterator[list[_Sample]]:
    """Members of the first sample: files with the same name up to the first dot (WebDataset)."""
    if remote.is_remote(address):
        raise DatasetError(f"{address}: describe one shard that was copied to this machine")
    path = Path(remote.local_path(address))
    members = untrusted.list_tar(path)[:200]
    samples = []
    if members:
        stem = _sample_name(members[0].name)
        with path.open("rb") as file:
            for member in members:
                suffix = member.name[len(_sample_name(member.name)) + 1 :]
                if _sample_name(member.name) != stem or member.size > _SAMPLE_BYTES:
                    continue
                file.seek(member.offset)
                content = file.read(member.size)
                if suffix.endswith("npy"):
                    array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
                    samples.append(_Sample(suffix, array.shape, str(array.dtype), (), array.__getitem__))
                elif (image := _image_sample(suffix, content)) is not None:
                    samples.append(image)
    yield samples


def _sample_name(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _image_sample(name: str, content: bytes) -> _Sample | None:
    """The image in the bytes of a GeoTIFF, PNG or JPEG 2000 file; None if it is none of them."""
    if content[:2] not in (b"II", b"MM", b"\x89P", b"\x00\x00", b"\xff\x4f"):
        return None
    try:
        with raw.open_raster_file(io.BytesIO(content), name) as raster:
            array = raster.read()
            extra: dict[str, Any] = {"nodata": raster.nodata}
            if raster.crs and raster.crs.is_projected:
                unit = unit_of(raster.crs.to_string(), raster.bounds)
                extra["resolution_m"] = unit.metres(abs(raster.transform.a))
            names = tuple(d or "" for d in raster.descriptions)
            if all(names):
                extra["band_names"] = names
            return _Sample(name, array.shape, str(array.dtype), ("band", "y", "x"), array.__getitem__, extra)
    except DatasetError:
        return None

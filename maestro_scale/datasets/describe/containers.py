"""Files that hold arrays, rather than one image: NetCDF, HDF5, Zarr, NumPy, Parquet, tars and STAC.

Each format is read far enough to list its arrays; what their axes are follows from their names or shapes. What cannot
be known is assumed, and said.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.describe.files import is_zarr
from maestro_scale.datasets.describe.probe import Values
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
_METRES_PER_DEGREE = 111_320.0


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
    """What an image file says: an array without its values, and how to read some of them."""

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


def read_arrays(path: Path) -> list[Array] | str:
    """The arrays of a file that may be images, or why it cannot be read."""
    suffix = suffix_of(path.name) or (".zarr" if is_zarr(path) else "")
    readers: dict[str, Callable[[Path], Any]] = {
        ".nc": _netcdf, ".nc4": _netcdf, ".h5": _hdf5, ".hdf5": _hdf5, ".he5": _hdf5, ".zarr": _zarr,
        ".zarr.zip": _zarr, ".npy": _npy, ".npz": _npz, ".parquet": _parquet, ".tar": _tar,
    }  # fmt: skip
    try:
        with contextmanager(readers[suffix])(path) as samples:
            found = [_array(s) for s in samples[:_MAX_ARRAYS]]
    except Exception as error:  # noqa: BLE001 - each library has its own errors for damaged files
        return " ".join(str(error).split())[:200] or type(error).__name__
    arrays = [a for a in found if a is not None]
    if not arrays:
        return "holds no arrays that could be images"
    sides = [a.size("y") * a.size("x") for a in arrays]
    return [a for a, side in zip(arrays, sides, strict=True) if side > 1]


def _array(sample: _Sample) -> Array | None:
    if len(sample.shape) < 2 or not set(sample.dtype.strip("0123456789")) <= set("uint float"):
        return None
    axes = axes_of(sample.dims, sample.shape)
    if axes is None or min(sample.shape[axes.index(a)] for a in "yx") < _MIN_SIDE:
        return None
    window = tuple(
        slice(0, min(n, {"key": 3, "date": 3, "band": 16}.get(axis, 256)))
        for axis, n in zip(axes, sample.shape, strict=True)
    )
    small = int(np.prod([s.stop for s in window])) * 8 <= _SAMPLE_BYTES
    values = _values_of(sample.read(window), sample.extra.get("nodata")) if small else None
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
    found = np.percentile(valid.astype(np.float64), [0, 2, 50, 98, 100]).tolist()
    distinct = np.unique(valid) if valid.dtype.kind in "iu" else None
    labels = tuple(distinct.tolist()) if distinct is not None and len(distinct) <= 256 else None
    return Values(*found, float(invalid.mean()), float((valid == 0).mean()), labels)


def _netcdf(path: Path) -> Iterator[list[_Sample]]:
    import xarray

    with xarray.open_dataset(path, engine="h5netcdf", decode_cf=False) as dataset:
        yield _from_xarray(dataset)


def _zarr(path: Path) -> Iterator[list[_Sample]]:
    import zarr

    store = zarr.storage.ZipStore(path, mode="r") if path.is_file() else str(path)
    root = zarr.open(store, mode="r")
    arrays = {"": root} if not hasattr(root, "members") else dict(root.members(max_depth=3))
    names = {n: a for n, a in sorted(arrays.items()) if hasattr(a, "shape")}
    dims = {n: _zarr_dims(a) for n, a in names.items()}
    samples = []
    for name, array in names.items():
        extra: dict[str, Any] = {}
        for d in dims[name]:
            prefix = name.rpartition("/")[0]
            coordinate = f"{prefix}/{d}" if prefix else d
            if coordinate in names and d.lower() in _AXES["date"]:
                extra["dates"] = d
            if coordinate in names and d.lower() in _AXES["key"]:
                extra["keys"] = d
            if coordinate in names and d.lower() in _AXES["x"]:
                extra |= _spacing(np.asarray(names[coordinate][:]), d)
        fill = array.attrs.get("_FillValue")
        extra["nodata"] = float(fill) if isinstance(fill, (int, float)) else None
        samples.append(
            _Sample(name or None, tuple(array.shape), str(array.dtype), dims[name], array.__getitem__, extra)
        )
    yield samples


def _zarr_dims(array: Any) -> tuple[str, ...]:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    return tuple(str(n) for n in names if n)


def _from_xarray(dataset: Any) -> list[_Sample]:
    samples = []
    for name, variable in sorted(dataset.data_vars.items()):
        extra: dict[str, Any] = {}
        for d in map(str, variable.dims):
            if d in dataset.variables and d.lower() in _AXES["date"]:
                extra["dates"] = d
            if d in dataset.variables and d.lower() in _AXES["key"]:
                extra["keys"] = d
            if d in dataset.variables and d.lower() in _AXES["x"]:
                extra |= _spacing(dataset.variables[d].values, d)
        attributes = variable.attrs
        fill = attributes.get("_FillValue", attributes.get("missing_value"))
        extra["nodata"] = None if fill is None else float(np.asarray(fill).ravel()[0])
        extra["scale"], extra["offset"] = (
            float(attributes.get(n, default)) for n, default in (("scale_factor", 1.0), ("add_offset", 0.0))
        )
        samples.append(
            _Sample(
                str(name),
                tuple(variable.shape),
                str(variable.dtype),
                tuple(map(str, variable.dims)),
                lambda window, variable=variable: np.asarray(variable[window].values),
                extra,
            )
        )
    return samples


def _spacing(x: np.ndarray, name: str) -> dict[str, Any]:
    """Pixel size from a coordinate: metres, or degrees if it is called longitude or cannot be metres."""
    if x.ndim != 1 or len(x) < 2 or x.dtype.kind not in "iuf":
        return {}
    step = abs(float(x[-1]) - float(x[0])) / (len(x) - 1)
    degrees = name.lower().startswith("lon") or (np.abs(x).max() <= 360 and step < 0.1)
    return {"resolution_m": float(f"{step * _METRES_PER_DEGREE:.2g}") if degrees else round(step, 6)}


def _hdf5(path: Path) -> Iterator[list[_Sample]]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        found: list[tuple[str, Any]] = []

        def visit(name: str, item: Any) -> None:
            # External and virtual datasets have their values in other files, which are not read.
            if isinstance(item, h5py.Dataset) and not item.is_virtual and item.external is None:
                found.append((name, item))

        file.visititems(visit)
        lengths = {n: item for n, item in found if item.ndim == 1 and item.dtype.kind in "SOiuV"}
        samples = []
        for name, item in sorted(found):
            if item.ndim < 2:
                continue
            extra: dict[str, Any] = {}
            same = [n for n, other in lengths.items() if item.ndim > 3 and len(other) == item.shape[0]]
            named = [
                n for n in same if any(k in n.lower() for k in ("key", "id", "name", "tile", "metadata"))
            ]
            if item.shape[0] > _MANY and named:
                extra["keys"] = named[0]
            samples.append(_Sample(name, item.shape, str(item.dtype), (), item.__getitem__, extra))
        yield samples


def _npy(path: Path) -> Iterator[list[_Sample]]:
    array = untrusted.open_npy(path)
    yield [_Sample(None, array.shape, str(array.dtype), (), array.__getitem__)]


def _npz(path: Path) -> Iterator[list[_Sample]]:
    with path.open("rb") as file, untrusted.open_zip(file, 1000) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    arrays = dict(zip(names, untrusted.load_npz(path, names), strict=True))
    yield [_Sample(n, a.shape, str(a.dtype), (), a.__getitem__) for n, a in sorted(arrays.items())]


def _parquet(path: Path) -> Iterator[list[_Sample]]:
    """Columns with the bytes of image files, in the first row."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = [f.name for f in file.schema_arrow if str(f.type) in ("binary", "large_binary")]
    texts = [f.name for f in file.schema_arrow if str(f.type) in ("string", "large_string")]
    keys = next((n for n in texts if any(k in n.lower() for k in ("cell", "key", "id", "name"))), None)
    dates = next(
        (f.name for f in file.schema_arrow if any(k in f.name.lower() for k in ("date", "time"))), None
    )
    batch = next(file.iter_batches(batch_size=1, columns=names), None)
    samples = []
    for name in names if batch is not None and batch.num_rows else []:
        content = batch.column(name)[0].as_py()
        if content and (image := _image_sample(name, content)) is not None:
            image.extra |= {"keys": keys, "dates": dates}
            samples.append(image)
    yield samples


def _tar(path: Path) -> Iterator[list[_Sample]]:
    """Members of the first sample: files with the same name up to the first dot (WebDataset)."""
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
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    from maestro_scale.datasets.describe.probe import driver_of

    if content[:2] not in (b"II", b"MM", b"\x89P", b"\x00\x00", b"\xff\x4f"):
        return None
    try:
        with MemoryFile(content) as memory, memory.open(driver=driver_of(content[:12])) as raster:
            array = raster.read()
            extra: dict[str, Any] = {"nodata": raster.nodata}
            if raster.crs and raster.crs.is_projected:
                extra["resolution_m"] = round(abs(raster.transform.a), 6)
            names = tuple(d or "" for d in raster.descriptions)
            if all(names):
                extra["band_names"] = names
            return _Sample(name, array.shape, str(array.dtype), ("band", "y", "x"), array.__getitem__, extra)
    except (RasterioError, MaestroError, ValueError):
        return None

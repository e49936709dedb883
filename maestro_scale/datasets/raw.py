"""Functions shared by the raw readers: files, dates and casts, with errors that name file and cause."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.datasets.spec import DatasetError, GeoOrigin


def list_folder(folder: Path) -> frozenset[str]:
    """File names in ``folder``; DatasetError if it is not a folder."""
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise DatasetError(f"{folder}: cannot list the folder ({error.strerror}); check the path") from error


def read_csv(path: Path) -> tuple[dict[str, int], list[list[str]]]:
    """Column name → index, and the rows; DatasetError if unreadable or if a row lacks values or has too many."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            header, *rows = [row for row in csv.reader(stream) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as CSV ({error})") from error
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise DatasetError(
                f"{path}: row {i + 2} has {len(row)} values for {len(header)} columns; fix the file"
            )
    return {name.strip(): i for i, name in enumerate(header)}, rows


class MissingFiles:
    """The tiles of a split that lack a file. ``files``: tile key → one missing file, relative to ``src``.

    DatasetError if all ``num_tiles`` tiles of ``listing`` lack one: then the folder is wrong. ``kind``: the category
    of the error of a single tile.
    """

    def __init__(
        self,
        src: Path,
        listing: Path,
        files: Mapping[str, str],
        num_tiles: int,
        kind: str = "a file is missing",
    ) -> None:
        self._src, self._listing, self._files, self._num_tiles = src, listing, dict(files), num_tiles
        self._kind = kind
        if files and len(files) == num_tiles:
            first = next(iter(files.values()))
            raise DatasetError(
                f"{listing}: none of its {num_tiles} tiles has its files in {src}, first {first}; check the path"
            )

    def check(self, key: str) -> None:
        """Raise DatasetError if tile ``key`` lacks a file."""
        if key in self._files:
            raise DatasetError(
                f"{self._src / self._files[key]}: is missing ({len(self._files)} of {self._num_tiles} tiles in "
                f"{self._listing.name} lack files); fetch it, or remove the tile from the list",
                kind=self._kind,
            )


def calendar_dates(days: Sequence[bytes | str], where: str) -> np.ndarray:
    """``YYYYMMDD`` strings → (T, 3) int16 (year, day of year, hour 0); DatasetError names a bad one."""
    texts = [d.decode("ascii", "replace") if isinstance(d, bytes) else d for d in days]
    for i, text in enumerate(texts):
        if len(text) != 8 or not (text.isascii() and text.isdigit()):
            raise DatasetError(f"{where}: entry {i} has {text!r} where a date YYYYMMDD is expected")
    try:
        stamps = np.array([f"{t[:4]}-{t[4:6]}-{t[6:]}" for t in texts], dtype="datetime64[D]")
    except ValueError as error:
        raise DatasetError(f"{where}: a date is not in the calendar ({error})") from error
    return day_dates(stamps)


def day_dates(stamps: np.ndarray) -> np.ndarray:
    """``datetime64[D]`` (T,) → (T, 3) int16 (year, day of year, hour 0)."""
    years = stamps.astype("datetime64[Y]")
    dates = np.zeros((len(stamps), 3), np.int16)
    dates[:, 0] = years.astype(np.int64) + 1970
    dates[:, 1] = (stamps - years.astype("datetime64[D]")).astype(np.int64) + 1
    return dates


def product_dates(products: Sequence[bytes], part: int, where: str) -> np.ndarray:
    """Acquisition dates from Copernicus product names, (T, 3) int16.

    ``part``: index from the end of the part between underscores that starts with YYYYMMDD (-5 for Sentinel-1 and
    -2). DatasetError names the first product without it.
    """
    days = []
    for i, product in enumerate(products):
        parts = product.rsplit(b"_", -part)
        if len(parts) < -part:
            name = product.decode("ascii", "replace")
            raise DatasetError(f"{where}: entry {i} is {name!r}, not a product name with a date")
        days.append(parts[part][:8])
    return calendar_dates(days, where)


def read_tif(path: Path, shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    """All bands of a GeoTIFF or PNG, (C, H, W); DatasetError if unreadable or not of ``shape`` and ``dtype``."""
    return read_georeferenced_tif(path, shape, dtype)[0]


def read_georeferenced_tif(
    path: Path, shape: tuple[int, int, int], dtype: str
) -> tuple[np.ndarray, GeoOrigin | None]:
    """As :func:`read_tif`, with the origin; None if the file has none or is not north up in metres."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # pixels without origin are fine
    try:
        # Without this option GDAL lists the folder at every open; raw folders hold 50,000 files and more.
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(path) as raster:
            found = (raster.count, raster.height, raster.width)
            if found != shape or raster.dtypes[0] != dtype:
                got = f"{raster.dtypes[0]} {_format_shape(found)}"
                raise DatasetError(
                    f"{path}: is {got}, expected {dtype} {_format_shape(shape)}; fetch the file again"
                )
            return raster.read(), _origin(raster)
    except (RasterioError, OSError) as error:
        raise read_error(path, error) from error


def _origin(raster: Any) -> GeoOrigin | None:
    t, crs = raster.transform, raster.crs
    if not crs or not crs.is_projected or t.b or t.d or t.e >= 0:
        return None
    return GeoOrigin(crs.to_string(), t.c, t.f)


def read_stack(path: Path, num_bands: int, size: int) -> np.ndarray:
    """A time series stored as bands of one GeoTIFF, date after date: (T, C, size, size) in the file's dtype.

    DatasetError if unreadable, of another size, or if the bands do not divide into dates.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    try:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(path) as raster:
            found = (raster.count, raster.height, raster.width)
            if found[1:] != (size, size) or found[0] % num_bands:
                raise DatasetError(
                    f"{path}: is {_format_shape(found)}, expected a multiple of {num_bands} bands of {size}×{size}; "
                    "fetch the file again"
                )
            return raster.read().reshape(-1, num_bands, size, size)
    except (RasterioError, OSError) as error:
        raise read_error(path, error) from error


def read_npy(path: Path, shape: tuple[int | None, ...], dtype: str) -> np.ndarray:
    """An array; DatasetError if unreadable or not of ``dtype`` and ``shape``; None stands for any length."""
    try:
        array = np.load(path, allow_pickle=False)  # a pickle in downloaded data could run code
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: cannot be read ({_one_line(error)}); fetch the file again") from error
    fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == len(shape)
    if not fits or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        got = f"{array.dtype} {_format_shape(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        expected = "×".join("T" if n is None else str(n) for n in shape)
        raise DatasetError(f"{path}: is {got}, expected {dtype} {expected}; fetch the file again")
    return array


def read_h5(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the datasets ``names`` that an HDF5 file has; DatasetError if it cannot be read."""
    import h5py

    try:
        # Without a lock: raw data is often on read-only or network file systems, which do not support it.
        with h5py.File(path, "r", locking=False) as file:
            return {name: file[name][()] for name in names if name in file}
    except (OSError, RuntimeError) as error:
        raise read_error(path, error) from error


def read_error(path: Path, error: Exception) -> DatasetError:
    """The DatasetError for a file that cannot be opened: missing or damaged."""
    if not path.exists():
        return DatasetError(
            f"{path}: is missing; fetch it, or remove the tile from the list", "a file is missing"
        )
    return DatasetError(f"{path}: cannot be read ({_one_line(error)}); fetch the file again")


def to_integers(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Cast floats to an integer dtype: (integers, mask of non-finite values or None, whether others were changed).

    NaN and infinities become 0; other values are rounded and clipped to the range of the dtype. Lossless and fast if
    the values are integral and in range already.
    """
    if values.dtype == dtype:
        return values, None, False
    limits = np.iinfo(dtype)
    with np.errstate(invalid="ignore"):
        integers = values.astype(dtype)
    if np.array_equal(integers, values):
        return integers, None, False
    bad = ~np.isfinite(values)
    clean = np.where(bad, 0, values)
    integers = np.clip(np.rint(clean), limits.min, limits.max).astype(dtype)
    return integers, bad if bad.any() else None, not np.array_equal(integers, clean)


def _format_shape(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Functions shared by the raw readers: files and dates, with errors that name file and cause."""

from __future__ import annotations

import csv
import io
import math
import os
import uuid
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.spec import DatasetError, GeoOrigin

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\0\0\0\x0cjP  \r\n\x87\n": "JP2OpenJPEG"}
_SIGNATURE_BYTES = 12
_MAX_BLOCK_BYTES = (
    64 * 1024 * 1024
)  # of a tile, strip or chunk, decompressed; the libraries allocate it at once
MAX_TEXT_BYTES = 64 * 1024 * 1024
"""Of all texts of a dataset of HDF5."""
_MAX_DATES = 20_000  # daily images of 50 years: a longer series in a raw file is damage


def list_folder(folder: Path) -> frozenset[str]:
    """File names in ``folder``; DatasetError if it is not a folder."""
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise DatasetError(f"{folder}: cannot list the folder ({error.strerror}); check the path") from error


def read_csv(path: Path) -> tuple[dict[str, int], list[list[str]]]:
    """Column name → index, and the rows; DatasetError if unreadable or if a row lacks values or has too many."""
    try:
        return parse_csv(untrusted.read_bytes(path), str(path))
    except (OSError, untrusted.InputError) as error:
        raise DatasetError(f"{path}: cannot be read as CSV ({error})") from error


def parse_csv(content: bytes, where: str) -> tuple[dict[str, int], list[list[str]]]:
    """As :func:`read_csv`, of the content of a file that ``where`` names."""
    try:
        text = content.decode("utf-8-sig")
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    except (ValueError, csv.Error) as error:
        raise DatasetError(f"{where}: cannot be read as CSV ({error})") from error
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise DatasetError(
                f"{where}: row {i + 2} has {len(row)} values for {len(header)} columns; fix the file"
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

    def lacks(self, key: str) -> bool:
        """Whether tile ``key`` lacks a file."""
        return key in self._files

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


class RasterFile(NamedTuple):
    """Bands of a file, (C, H, W) or (T, C, H, W); ``invalid``: pixels that the file declares as invalid, or None.

    ``origin``: None if the file has none or is not north up in metres.
    """

    values: np.ndarray
    invalid: np.ndarray | None
    origin: GeoOrigin | None


def read_tif(path: Path, shape: tuple[int, int, int], dtype: str, num_classes: int = 0) -> RasterFile:
    """All bands (C, H, W) of a GeoTIFF or PNG; DatasetError if unreadable or not of ``shape`` and ``dtype``.

    ``num_classes``: of a label image, whose classes are values even where a nodata tag says otherwise: files with a
    nodata tag of 0 and a class 0 are common.
    """
    with open_raster(path) as raster:
        num_bands = raster.count - has_extra_alpha(raster, shape[0])
        found = (num_bands, raster.height, raster.width)
        if found != shape or raster.dtypes[0] != dtype:
            got = f"{raster.dtypes[0]} {_format_shape((raster.count, *found[1:]))}"
            raise DatasetError(
                f"{path}: is {got}, expected {dtype} {_format_shape(shape)}; fetch the file again"
            )
        pixels = _first_bands(raster, num_bands, num_classes)
        return RasterFile(*pixels, origin_of(raster))


def read_stack(path: Path, num_bands: int, size: int) -> RasterFile:
    """A time series stored as bands of one GeoTIFF, date after date: (T, C, size, size) in the file's dtype.

    DatasetError if unreadable, of another size, or if the bands do not divide into dates.
    """
    with open_raster(path) as raster:
        count = raster.count - has_extra_alpha(raster, num_bands)
        if (raster.height, raster.width) != (size, size) or count % num_bands:
            raise DatasetError(
                f"{path}: is {_format_shape((raster.count, raster.height, raster.width))}, expected a multiple of "
                f"{num_bands} bands of {size}×{size}; fetch the file again"
            )
        shape = (-1, num_bands, size, size)
        values, invalid = _first_bands(raster, count)
        return RasterFile(
            values.reshape(shape), None if invalid is None else invalid.reshape(shape), origin_of(raster)
        )


@contextmanager
def open_raster(path: Path) -> Iterator[Any]:
    """An open rasterio dataset; DatasetError if the file cannot be opened, or read in the block."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # pixels without origin are fine
    # With EMPTY_DIR GDAL does not list the folder at every open; raw folders hold 50,000 files and more. But then it
    # ignores sidecar files, too: where one may have a mask or a nodata value, TRUE (no list, but look-ups by name).
    has_mask = os.path.exists(f"{path}.msk")
    sidecar = has_mask or os.path.exists(f"{path}.aux.xml")
    try:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE" if sidecar else "EMPTY_DIR"):
            if has_mask:  # GDAL opens it with any driver
                with rasterio.open(f"{path}.msk", driver="GTiff") as mask:
                    _check_blocks(path, mask)
            with rasterio.open(path, driver=_driver(path)) as raster:
                _check_blocks(path, raster)
                yield raster
    except (RasterioError, OSError) as error:
        raise read_error(path, error) from error


@contextmanager
def open_raster_file(file: BinaryIO, where: str) -> Iterator[Any]:
    """As :func:`open_raster`, of an open file, of which only what is needed is read; ``where`` names it in messages.

    A mask or nodata value in a file beside it is not looked for.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    name = f"{uuid.uuid4().hex}.tif"  # rasterio keeps openers by path
    failures: list[OSError] = []

    def opener(path: str, mode: str = "rb") -> BinaryIO:
        if not path.endswith(name):
            raise FileNotFoundError(path)
        return _Reopened(file, failures)  # type: ignore[return-value]

    try:
        file.seek(0)
        driver = _driver_of(file.read(_SIGNATURE_BYTES))
        with (
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
            rasterio.open(name, driver=driver, opener=opener) as raster,
        ):
            _check_blocks(where, raster)
            yield raster
    except (RasterioError, OSError) as error:
        # GDAL's own message would call a network that failed a damaged file.
        cause = (_one_line(failures[0]) if failures else _one_line(error)).replace(name, "")
        raise DatasetError(f"{where}: cannot be read ({cause}); fetch the file again") from error


class _Reopened:
    """An open file with a position of its own; closing it leaves the file open. Errors of reads are kept."""

    def __init__(self, file: BinaryIO, failures: list[OSError]) -> None:
        self._file, self._failures, self._position = file, failures, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        start = self._position if whence == 1 else 0
        self._position = self._file.seek(0, 2) + offset if whence == 2 else start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        try:
            self._file.seek(self._position)
            data = self._file.read(size)
        except OSError as error:
            self._failures.append(error)
            raise
        self._position += len(data)
        return data

    def close(self) -> None:
        pass

    def __enter__(self) -> _Reopened:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _driver(path: Path) -> str:
    with path.open("rb") as file:
        return _driver_of(file.read(_SIGNATURE_BYTES))


def _driver_of(start: bytes) -> str:
    """GDAL's driver for a file. Its choice among all of them includes some for files that name other files and
    addresses, such as a VRT, whatever the suffix."""
    return next((driver for signature, driver in _SIGNATURES.items() if start.startswith(signature)), "GTiff")


def _check_blocks(path: Path | str, raster: Any) -> None:
    for (height, width), dtype in zip(raster.block_shapes, raster.dtypes, strict=True):
        if height * width * np.dtype(dtype).itemsize > _MAX_BLOCK_BYTES:
            raise DatasetError(
                f"{path}: has tiles of {width}×{height} pixels, which exceed 64 MiB; write it again"
            )


def has_extra_alpha(raster: Any, num_bands: int) -> bool:
    """Whether the last band is an alpha channel after a multiple of ``num_bands`` bands of data.

    An alpha channel among the expected bands is data: GDAL marks the fourth of four uint8 bands as alpha by default,
    and here it is near-infrared (TreeSatAI-TS, FLAIR-HUB) or in a PNG (NAIP).
    """
    from rasterio.enums import ColorInterp

    rest = raster.count % num_bands
    return raster.count > num_bands and rest == 1 % num_bands and raster.colorinterp[-1] == ColorInterp.alpha


def _first_bands(raster: Any, num: int, num_classes: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    return read_bands(raster, range(1, num + 1), alpha=num < raster.count, labels=range(num_classes))


def read_bands(
    raster: Any,
    bands: Sequence[int],
    *,
    alpha: bool = False,
    labels: Container[float] = (),
    window: Any = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bands, by number from 1, and the pixels that a nodata value or mask band declares invalid.

    ``alpha``: the last band of the file is an alpha channel that declares invalid pixels, too. ``labels``: values that
    are labels, even if they are the nodata value; what a mask band marks is invalid all the same. ``window``: of
    rasterio; None: the whole image. Not by GDAL's own mask flags alone: these take an alpha channel among the data for
    a mask, and ignore the nodata value of a file that has a mask band too.
    """
    from rasterio.enums import MaskFlags

    values = raster.read(list(bands), window=window)
    invalid = np.zeros(values.shape, bool)
    for i, nodata in enumerate(raster.nodatavals[band - 1] for band in bands):
        if nodata is None or nodata in labels:
            continue
        with np.errstate(
            over="ignore"
        ):  # the tag of a float32 file may be a double that is infinite in float32
            number = values.dtype.type(nodata) if values.dtype.kind == "f" else nodata
        invalid[i] |= np.isnan(values[i]) if np.isnan(nodata) else values[i] == number
    flags = [raster.mask_flag_enums[band - 1] for band in bands]
    masked = [
        i
        for i, flag in enumerate(flags)
        if not {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha} & set(flag)
    ]
    if masked and all(MaskFlags.per_dataset in flags[i] for i in masked):
        invalid[masked] |= raster.read_masks(1, window=window) == 0
    else:
        for i in masked:
            invalid[i] |= raster.read_masks(bands[i], window=window) == 0
    if alpha:
        invalid |= raster.read(raster.count, window=window) == 0
    return values, invalid if invalid.any() else None


def origin_of(raster: Any) -> GeoOrigin | None:
    """Where an open raster lies; None if it does not say, or is not north up in metres."""
    t, crs = raster.transform, raster.crs
    if not crs or not crs.is_projected or crs.linear_units_factor[1] != 1 or t.b or t.d or t.e >= 0:
        return None
    return GeoOrigin(crs.to_string(), t.c, t.f)


def read_npy(path: Path, shape: tuple[int | None, ...], dtype: str) -> np.ndarray:
    """An array; DatasetError if unreadable or not of ``dtype`` and ``shape``; None stands for any length."""
    try:
        # Mapped first, to check the header: loading allocates what it claims. No pickles, which could run code.
        array = untrusted.open_npy(path)
        _check_array(array.dtype, array.shape, Field("numbers", shape, dtype), str(path))
        return np.array(array)
    except (OSError, untrusted.InputError) as error:
        raise read_error(path, error) from error


@dataclass(frozen=True)
class Field:
    """What a file should contain. ``shape``: None stands for any length; ``dtype``: empty for any real numbers."""

    kind: Literal["numbers", "text"]
    shape: tuple[int | None, ...]
    dtype: str = ""


def read_h5(path: Path, fields: Mapping[str, Field], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Datasets of an HDF5 file by name; text as an array of bytes.

    DatasetError if the file cannot be read, lacks one that is not ``optional``, or has something else in its place: a
    group, another type or another shape. Both are checked before anything is read, so a file cannot claim more memory.
    """
    import h5py

    content: dict[str, np.ndarray] = {}
    try:
        # Without a lock: raw data is often on read-only or network file systems, which do not support it.
        with h5py.File(path, "r", locking=False) as file:
            for name, field in fields.items():
                where = f"{path}: {name}"
                if name not in file and name not in optional:
                    raise DatasetError(f"{path}: has no dataset {name!r}; fetch the file again")
                if name not in file:
                    continue
                check_link(file, name, where)
                item = file[name]
                if not isinstance(item, h5py.Dataset):
                    raise DatasetError(
                        f"{where} is a group, expected {_expected(field)}; fetch the file again"
                    )
                text = item.dtype.kind == "S" or h5py.check_string_dtype(item.dtype) is not None
                _check_array(item.dtype, item.shape, field, where, text)
                check_storage(item, where)
                content[name] = _read_texts(item, path, where) if text else item[()]
        return content
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
        raise read_error(path, error) from error


def h5_lengths(path: Path, names: Sequence[str]) -> dict[str, int]:
    """Lengths of the first axis of datasets of an HDF5 file, by name; 0 for one that it lacks. Reads no values.

    DatasetError if the file cannot be read.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            shapes = {n: getattr(file[n], "shape", None) or (1,) for n in names if _has_hard_link(file, n)}
            return {n: shapes[n][0] if n in shapes else int(n in file) for n in names}
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise read_error(path, error) from error


def _has_hard_link(file: Any, name: str) -> bool:
    import h5py

    return isinstance(file.get(name, getlink=True), h5py.HardLink)


def check_link(file: Any, name: str, where: str) -> None:
    """DatasetError if ``name`` is in another file, which a file from others could choose."""
    # A soft link may lead to an external one.
    if not _has_hard_link(file, name):
        raise DatasetError(f"{where} is a link, which is not followed; fetch the file again")


def check_storage(item: Any, where: str) -> None:
    """As :func:`check_link`, for the values of a dataset; also if its chunks take too much memory."""
    if item.external is not None or item.is_virtual:
        raise DatasetError(f"{where} has values in another file, which is not read; fetch the file again")
    if item.chunks is not None and math.prod(item.chunks) * item.dtype.itemsize > _MAX_BLOCK_BYTES:
        raise DatasetError(
            f"{where} has chunks of {_format_shape(item.chunks)}, which exceed 64 MiB; write it again"
        )


def _read_texts(item: Any, path: Path, where: str) -> np.ndarray:
    # Many elements of variable length may be the same bytes of the file.
    if item.size * path.stat().st_size <= MAX_TEXT_BYTES or item.dtype.kind == "S":
        return np.asarray(item[()])
    texts: list[Any] = []
    total = 0
    for index in np.ndindex(item.shape):
        texts.append(item[index])
        total += len(texts[-1])
        if total > MAX_TEXT_BYTES:
            raise DatasetError(f"{where} has texts of more than 64 MiB; fetch the file again")
    return np.array(texts, object).reshape(item.shape)


def _check_array(
    dtype: np.dtype, shape: tuple[int, ...] | None, field: Field, where: str, text: bool = False
) -> None:
    """DatasetError unless dtype and shape are those of ``field``; ``text``: whether the elements are strings."""
    right = text if field.kind == "text" else (dtype == field.dtype if field.dtype else dtype.kind in "biuf")
    fits = shape is not None and len(shape) == len(field.shape)
    if (
        not right
        or not fits
        or any(n not in (None, m) for n, m in zip(field.shape, shape or (), strict=True))
    ):
        got = f"{'text' if text else dtype} {_format_shape(shape or ())}"
        raise DatasetError(f"{where}: is {got}, expected {_expected(field)}; fetch the file again")
    if shape and shape[0] > _MAX_DATES and field.shape[0] is None:
        raise DatasetError(f"{where}: has {shape[0]} dates, more than {_MAX_DATES}; fetch the file again")


def _expected(field: Field) -> str:
    shape = "×".join("T" if n is None else str(n) for n in field.shape)
    return f"{field.dtype or field.kind} {shape}"


def read_error(path: Path, error: Exception) -> DatasetError:
    """The DatasetError for a file that cannot be opened: missing or damaged."""
    if not path.exists():
        return DatasetError(
            f"{path}: is missing; fetch it, or remove the tile from the list", "a file is missing"
        )
    return DatasetError(f"{path}: cannot be read ({_one_line(error)}); fetch the file again")


def _format_shape(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape) or "scalar"


def _one_line(error: Exception) -> str:
    """The message; rasterio's "Read failed. See previous exception" has GDAL's, which says more, as its cause."""
    return " ".join(str(error.__cause__ or error).split())

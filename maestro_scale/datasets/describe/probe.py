"""What the headers of raster files say, and the range of some of their values."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.describe.units import METRES, Unit, unit_of
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import DatasetError

SUFFIXES = (".tif", ".tiff", ".jp2", ".png")
_MAX_DISTINCT = 256
_WINDOW = 256  # pixels per side of the windows that values are read from
_LARGEST = 1e30  # larger numbers are fill values


@dataclass(frozen=True)
class Header:
    """What one file says about itself. ``resolution``: in units of the CRS; ``datetime``: of a metadata tag."""

    width: int
    height: int
    count: int
    dtype: str
    crs: str | None
    unit: Unit
    resolution: float
    bounds: tuple[float, float, float, float] | None  # west, south, east, north, in the CRS
    nodata: float | None
    has_mask: bool
    has_alpha: bool
    band_names: tuple[str, ...]  # empty where the file names none
    scale: float
    offset: float
    datetime: str
    blocks: tuple[int, int]
    bytes: int

    @property
    def resolution_m(self) -> float | None:
        """Size of a pixel on the ground in metres, at the middle of the file. None without coordinates."""
        return None if self.bounds is None else self.unit.metres(self.resolution)

    def kind(self) -> Hashable:
        """What files of one raster have in common."""
        return (self.count - self.has_alpha, self.dtype, f"{self.resolution:.3g}")


@dataclass(frozen=True)
class Values:
    """Of pixels read here and there: smallest, largest and percentiles of the valid ones; ``distinct`` if few."""

    low: float
    p02: float
    median: float
    p98: float
    high: float
    invalid: float  # fraction: declared by the file, or not finite
    zeros: float
    distinct: tuple[int, ...] | None


def spread_of(
    valid: np.ndarray, invalid: float, zeros: float, distinct: tuple[int, ...] | None = None
) -> Values:
    """The values of a sample of valid pixels."""
    low, p02, median, p98, high = np.percentile(valid.astype(np.float64), [0, 2, 50, 98, 100]).tolist()
    return Values(low, p02, median, p98, high, invalid, zeros, distinct)


class Prober:
    """Reads headers of the files below a folder or an address, each once. ``unreadable``: path → why."""

    def __init__(self, src: str) -> None:
        self._src = src
        self._headers: dict[str, Header | None] = {}
        self.unreadable: dict[str, str] = {}

    def header(self, path: str) -> Header | None:
        """The header of a file, or None if it cannot be read."""
        if path not in self._headers:
            self._headers[path] = self._read_header(path)
        return self._headers[path]

    def kind(self, path: str) -> Hashable:
        """See :meth:`Header.kind`."""
        header = self.header(path)
        return None if header is None else header.kind()

    def headers(self, paths: Sequence[str], most: int = 8) -> list[Header]:
        """Headers of at most ``most`` of the files, spread over them."""
        return [h for h in map(self.header, spread(paths, most)) if h is not None]

    def values(
        self, paths: Sequence[str], most: int = 3, nodata: Sequence[float] = (), whole: bool = False
    ) -> Values | None:
        """Values of some windows of at most ``most`` files; ``whole``: of larger parts, to find all labels.

        None if nothing is valid there. ``nodata``: values that mean "not measured" beside those that the file declares.
        """
        sampled: list[np.ndarray] = []
        num_all = num_valid = num_zeros = 0
        distinct: set[int] | None = set()
        for path in spread(paths, most):
            for values, invalid in self._read_windows(path, 1024 if whole else _WINDOW):
                for number in nodata:
                    invalid |= values == number
                valid = values[~invalid]
                num_all, num_valid = num_all + values.size, num_valid + valid.size
                num_zeros += int((valid == 0).sum())
                sampled.append(valid[:: valid.size // 50_000 + 1].astype(np.float64))
                if valid.dtype.kind == "f":
                    distinct = None
                if distinct is not None:
                    distinct |= set(np.unique(valid).tolist())
                    distinct = distinct if len(distinct) <= _MAX_DISTINCT else None
        if not num_valid:
            return None
        labels = None if distinct is None else tuple(sorted(distinct))
        return spread_of(np.concatenate(sampled), 1 - num_valid / num_all, num_zeros / num_valid, labels)

    def _read_windows(self, path: str, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(values, invalid) of windows in the middle and towards two corners of a file."""
        header = self.header(path)
        if header is None:
            return []
        windows = []
        for share in (0.5, 0.2, 0.8) if max(header.width, header.height) > side else (0.5,):
            row, col = (int(max(0, n - side) * share) for n in (header.height, header.width))
            windows.append(((row, min(row + side, header.height)), (col, min(col + side, header.width))))
        count = header.count - header.has_alpha
        bands = list(range(1, count + 1)) if count <= 16 else spread(range(1, count + 1), 16)
        parts = []
        try:
            with _opened(remote.join(self._src, path)) as (raster, _):
                for window in windows:
                    values = raster.read(bands, window=window)
                    invalid = (
                        ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
                    )
                    if values.dtype.kind == "f":
                        invalid |= ~(np.abs(values) < _LARGEST)
                    if header.nodata is not None:
                        invalid |= values == header.nodata
                    if header.has_mask or header.has_alpha:
                        invalid |= raster.dataset_mask(window=window) == 0
                    parts.append((values, invalid))
        except (DatasetError, ValueError) as error:
            self._fail(path, error)
        return parts

    def _read_header(self, path: str) -> Header | None:
        try:
            with _opened(remote.join(self._src, path)) as (raster, num_bytes):
                return _header_of(raster, num_bytes)
        except (DatasetError, ValueError) as error:
            self._fail(path, error)
            return None

    def _fail(self, path: str, error: Exception) -> None:
        text = " ".join(str(error).split()).removeprefix(f"{remote.join(self._src, path)}: ")
        self.unreadable[path] = text[:200]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, the first and the last among them, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)] if most > 1 else [items[0]]


@contextmanager
def _opened(address: str) -> Iterator[tuple[Any, int]]:
    """An open raster, and the size of its file in bytes."""
    if remote.is_remote(address):
        with remote.open_binary(address) as file:
            num_bytes = file.seek(0, 2)
            with raw.open_raster_file(file, address) as raster:
                yield raster, num_bytes
        return
    path = Path(remote.local_path(address))
    with raw.open_raster(path) as raster:
        yield raster, path.stat().st_size


def _header_of(raster: Any, num_bytes: int) -> Header:
    from rasterio.enums import ColorInterp, MaskFlags

    crs, t = raster.crs, raster.transform
    placed = bool(crs) and not t.is_identity
    alpha = raster.count in (2, 4) and raster.colorinterp[-1] == ColorInterp.alpha
    tags = {k.upper(): v for k, v in raster.tags().items()}
    when = next((tags[k] for k in ("TIFFTAG_DATETIME", "ACQUISITIONDATETIME") if k in tags), "")
    flags = raster.mask_flag_enums[0]
    return Header(
        width=raster.width,
        height=raster.height,
        count=raster.count,
        dtype=raster.dtypes[0],
        crs=_crs_text(crs) if crs else None,
        unit=unit_of(_crs_text(crs), raster.bounds) if placed else METRES,
        resolution=abs(t.a),
        bounds=tuple(raster.bounds) if placed else None,
        nodata=raster.nodata,
        has_mask=MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
        has_alpha=alpha and _is_alpha(raster),
        band_names=_band_names(raster),
        scale=float(raster.scales[0]),
        offset=float(raster.offsets[0]),
        datetime=when,
        blocks=tuple(raster.block_shapes[0]),
        bytes=num_bytes,
    )


def _crs_text(crs: Any) -> str:
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.to_wkt()


def _is_alpha(raster: Any) -> bool:
    """Whether the last band is a mask. GDAL marks the fourth of four uint8 bands as alpha even if it is infrared."""
    side = 128
    row, col = (max(0, n // 2 - side // 2) for n in (raster.height, raster.width))
    window = ((row, min(row + side, raster.height)), (col, min(col + side, raster.width)))
    values = np.unique(raster.read(raster.count, window=window))
    largest = np.iinfo(raster.dtypes[-1]).max if np.dtype(raster.dtypes[-1]).kind in "iu" else 1
    return set(values.tolist()) <= {0, largest}


def _band_names(raster: Any) -> tuple[str, ...]:
    names = tuple(" ".join((d or "").split()) for d in raster.descriptions)
    return names if all(names) and len(set(names)) == len(names) else ()

"""From the pixels of an image to those of a tile: exact windows where the pixel grids match, else resampling by GDAL.

Shapes: C bands, h×w pixels of a source window, n×n pixels of a tile. A window is (row, column, height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from maestro_scale.datasets.scenes.grid import Box

Resampling = Literal[
    "nearest", "bilinear", "cubic", "cubic_spline", "lanczos", "average", "mode", "max", "min", "med", "rms"
]
RESAMPLINGS: tuple[str, ...] = get_args(Resampling)

Window = tuple[int, int, int, int]
Shape = tuple[int, int]
Affine = tuple[float, float, float, float, float, float]
"""x = a·col + b·row + c, y = d·col + e·row + f, as of ``rasterio``'s transforms."""

_SAME_PIXEL = 1e-3  # of a pixel: two grids that differ by less are the same; files round their coordinates
_MARGIN = 4  # source pixels that the widest kernel (Lanczos: 3) needs around a tile, and one
_TOLERANCE = 0.01  # of a pixel, of GDAL's approximation of the transformation between two CRS
_EDGE_POINTS = 21  # per edge of a box that is transformed: edges are curves in another CRS
_KERNELS = ("bilinear", "cubic", "cubic_spline", "lanczos")  # that grow with the pixels of the tile
_OVERSHOOTING = ("cubic", "lanczos")  # whose kernels have negative weights
_EXACT_IN_FLOAT32 = ("uint8", "int8", "uint16", "int16", "float16", "float32")


@dataclass(frozen=True)
class Placement:
    """Where the pixels of an image lie: its CRS (canonical, see ``grid.parse_crs``), transform and size."""

    crs: str
    transform: Affine
    width: int
    height: int


class Pixels(NamedTuple):
    """Values (C, h, w), and which of them are invalid (None: none)."""

    values: np.ndarray
    invalid: np.ndarray | None


def exact_window(place: Placement, crs: str, box: Box, shape: Shape) -> Window | None:
    """The window of an image whose pixels are those of a box of ``shape`` pixels; None if the grids differ.

    The window may exceed the image.
    """
    a, b, c, d, e, f = place.transform
    pixel_m = (box.east - box.west) / shape[1]
    if place.crs != crs or b or d or e >= 0:
        return None
    # Over the whole box, the difference of the pixel sizes must not add up to a pixel either.
    if max(abs(a - pixel_m), abs(-e - pixel_m)) * max(shape) > _SAME_PIXEL * pixel_m:
        return None
    col, row = (box.west - c) / a, (box.north - f) / e
    if abs(col - round(col)) > _SAME_PIXEL or abs(row - round(row)) > _SAME_PIXEL:
        return None
    return round(row), round(col), *shape


def source_window(place: Placement, crs: str, box: Box, shape: Shape) -> Window | None:
    """The window of an image that is needed to resample it to a box of ``shape`` pixels; None if they do not overlap.

    It is clipped to the image, and depends on the image and the box alone.
    """
    a, b, c, d, e, f = place.transform
    if place.crs == crs:
        west, south, east, north = box
    else:
        bounds = transformed_bounds(crs, place.crs, box)
        if bounds is None:
            return None
        west, south, east, north = bounds
    det = a * e - b * d
    xs, ys = np.array([west, east, east, west]) - c, np.array([north, north, south, south]) - f
    cols, rows = (e * xs - b * ys) / det, (a * ys - d * xs) / det
    # Where the tile has larger pixels, kernels grow with them.
    num_pixels = (cols.max() - cols.min()) * (rows.max() - rows.min())
    scale = max(1.0, math.sqrt(num_pixels / (shape[0] * shape[1])))
    margin = math.ceil(_MARGIN * scale)
    first_col, last_col = math.floor(cols.min()) - margin, math.ceil(cols.max()) + margin
    first_row, last_row = math.floor(rows.min()) - margin, math.ceil(rows.max()) + margin
    return clipped((first_row, first_col, last_row - first_row, last_col - first_col), place)


def clipped(window: Window, place: Placement) -> Window | None:
    """The part of a window within the image; None if there is none."""
    row, col, height, width = window
    top, left = max(row, 0), max(col, 0)
    bottom, right = min(row + height, place.height), min(col + width, place.width)
    return (top, left, bottom - top, right - left) if bottom > top and right > left else None


def padded(pixels: Pixels, inner: Window, outer: Window) -> Pixels:
    """The pixels of window ``inner`` as those of ``outer``, which contains it; the others are 0 and invalid."""
    if inner == outer:
        return pixels
    values = np.zeros((len(pixels.values), outer[2], outer[3]), pixels.values.dtype)
    invalid = np.ones(values.shape, bool)
    rows = slice(inner[0] - outer[0], inner[0] - outer[0] + inner[2])
    cols = slice(inner[1] - outer[1], inner[1] - outer[1] + inner[3])
    values[:, rows, cols] = pixels.values
    invalid[:, rows, cols] = False if pixels.invalid is None else pixels.invalid
    return Pixels(values, invalid)


def resample(
    pixels: Pixels, place: Placement, window: Window, crs: str, box: Box, size: int, method: Resampling
) -> Pixels:
    """The pixels of ``window`` of an image on the grid of a tile, (C, size, size), in their dtype.

    Invalid pixels have no weight; where a kernel finds no valid pixel, the result is invalid. Integers are rounded.
    """
    from rasterio.enums import Resampling as Methods
    from rasterio.warp import reproject

    dtype = pixels.values.dtype
    work = np.float32 if dtype.name in _EXACT_IN_FLOAT32 else np.float64
    source = pixels.values.astype(work)
    if pixels.invalid is not None:
        source[pixels.invalid] = np.nan
    target = np.full((len(source), size, size), np.nan, work)
    a, b, c, d, e, f = place.transform
    row, col = window[:2]
    reproject(
        source,
        target,
        src_transform=_affine((a, b, c + a * col + b * row, d, e, f + d * col + e * row)),
        src_crs=_crs(place.crs),
        src_nodata=np.nan,
        dst_transform=_affine(tile_transform(box, size)),
        dst_crs=_crs(crs),
        dst_nodata=np.nan,
        resampling=Methods[method],
        tolerance=_TOLERANCE,
        **(_scales(place, crs, box, size) if method in _KERNELS else {}),
        UNIFIED_SRC_NODATA="NO",  # a band that is invalid does not make the others invalid
    )
    invalid = np.isnan(target)
    if method in _OVERSHOOTING:
        _limit(target, source)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        target[invalid] = 0
        values = np.clip(np.rint(target), limits.min, limits.max).astype(dtype)
    else:
        values = target.astype(dtype, copy=False)
    return Pixels(values, invalid if invalid.any() else None)


def _limit(target: np.ndarray, source: np.ndarray) -> None:
    """Keep each band of ``target`` within the values of ``source``, so that no power becomes negative; NaN stays."""
    for band, values in zip(target, source, strict=True):
        lowest, highest = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
        np.clip(band, lowest, highest, out=band)


def _scales(place: Placement, crs: str, box: Box, size: int) -> dict[str, float]:
    """Options of GDAL: pixels of the tile per pixel of the image, along the image's rows and columns.

    GDAL would guess them from the window, which is smaller at the edge of an image and larger where it is rotated.
    """
    a, b, _, d, e, _ = place.transform
    step = (box.east - box.west) / size
    x, y = (box.west + box.east) / 2, (box.south + box.north) / 2
    xs, ys = np.array([x, x + step, x]), np.array([y, y, y + step])
    if place.crs != crs:
        xs, ys = transformer(crs, place.crs).transform(xs, ys)
    dx, dy = np.diff(xs)[0], np.diff(ys)[0]
    ex, ey = xs[2] - xs[0], ys[2] - ys[0]
    det = a * e - b * d
    cols = math.hypot(e * dx - b * dy, e * ex - b * ey) / abs(det)
    rows = math.hypot(a * dy - d * dx, a * ey - d * ex) / abs(det)
    if not (math.isfinite(cols) and math.isfinite(rows) and cols > 0 and rows > 0):
        return {}
    return {"XSCALE": 1 / cols, "YSCALE": 1 / rows}


def transformed_bounds(crs_from: str, crs_to: str, box: Box) -> Box | None:
    """The bounds of a box in another CRS, of its edges as curves; None where they cannot be transformed."""
    bounds = transformer(crs_from, crs_to).transform_bounds(*box, densify_pts=_EDGE_POINTS)
    return Box(*bounds) if all(map(math.isfinite, bounds)) else None


@lru_cache(maxsize=64)
def transformer(crs_from: str, crs_to: str) -> Any:
    """The transformer of x and y between two CRS, in the order (east, north)."""
    from pyproj import Transformer

    return Transformer.from_crs(crs_from, crs_to, always_xy=True)


@lru_cache(maxsize=64)
def _crs(crs: str) -> Any:
    from rasterio.crs import CRS

    return CRS.from_user_input(crs)


def tile_transform(box: Box, size: int) -> Affine:
    """The transform of a tile of ``size`` pixels per side."""
    pixel_m = (box.east - box.west) / size
    return pixel_m, 0.0, box.west, 0.0, -pixel_m, box.north


def _affine(transform: Affine) -> Any:
    from rasterio.transform import Affine as RasterioAffine

    return RasterioAffine(*transform)

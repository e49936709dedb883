"""The images of one raster over one cell: windows of all scenes there, mosaicked by date.

Shapes: T dates, C bands, n×n pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from maestro_scale.datasets.scenes.buffer import Windows
from maestro_scale.datasets.scenes.grid import Box, Cell, Grid
from maestro_scale.datasets.scenes.images import Scene, Shot
from maestro_scale.datasets.scenes.warp import (
    Pixels,
    Resampling,
    clipped,
    exact_window,
    padded,
    resample,
    source_window,
)
from maestro_scale.datasets.sources.protocol import Date

Mosaic = Literal["day", "all"]
"""Which images are one image: those of a day, or all, of a raster that is no series."""

FEW_VALID = "few valid pixels"
"""Kind of the error of a cell with too few valid pixels: it is left out."""

Invalid = Callable[[np.ndarray, tuple[int, ...]], "np.ndarray | None"]
"""Which values (C, h, w) of a file with these bands of a raster are no measurement, beside those that it declares; None
for none."""


def not_finite(values: np.ndarray, bands: tuple[int, ...]) -> np.ndarray | None:
    """NaN and infinities."""
    if values.dtype.kind != "f":
        return None
    bad: np.ndarray = ~np.isfinite(values)
    return bad if bad.any() else None


@dataclass(frozen=True)
class SceneRaster:
    """How scenes become one raster of the tiles.

    ``invalid``: finds values that must not be mixed with their neighbours when an image is resampled. ``marks``: of
    masks (1, n, n) that say where nothing was measured, by name, (n, n) bool.
    """

    name: str
    num_bands: int
    size: int  # pixels per side of a tile
    resampling: Resampling
    min_valid: float  # of the pixels of an image of a tile, with all bands valid
    masks: tuple[str, ...] = ()
    mosaic: Mosaic = "day"
    invalid: Invalid = not_finite
    marks: Mapping[str, Callable[[Pixels], np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """Values (T, C, n, n), which are invalid (None: none), date (None: undated) and file of each image, and by name the
    values of masks (T, 1, n, n) in their own types with the pixels that no mask covers (None: none)."""

    values: np.ndarray
    invalid: np.ndarray | None
    dates: tuple[Date | None, ...]
    names: tuple[str, ...]
    masks: Mapping[str, Pixels] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Image:
    bands: Pixels  # (C, n, n)
    masks: Mapping[str, Pixels]  # (1, n, n)
    date: Date | None  # of the shot that comes first in the mosaic
    name: str

    @property
    def bad(self) -> np.ndarray | None:
        """(n, n) where any band is invalid; None for nowhere."""
        return None if self.bands.invalid is None else np.asarray(self.bands.invalid.any(axis=0))


class SceneSeries:
    """Reads the series of a raster by cell."""

    def __init__(self, raster: SceneRaster, shots: Sequence[Shot], grid: Grid) -> None:
        self.raster = raster
        self.shots = tuple(sorted(shots, key=lambda s: s.name))
        self._grid = grid
        self._bounds = np.array([s.box for s in self.shots], float).reshape(-1, 4)

    @property
    def extent(self) -> Box:
        """The bounds of all shots, of which there are some."""
        return Box(*self._bounds[:, :2].min(axis=0).tolist(), *self._bounds[:, 2:].max(axis=0).tolist())

    def touching(self, box: Box) -> list[Shot]:
        """The shots whose bounds have a common point with a box, sorted by name."""
        west, south, east, north = self._bounds.T
        hit = (west < box.east) & (east > box.west) & (south < box.north) & (north > box.south)
        return [self.shots[i] for i in np.flatnonzero(hit)]

    def read(self, cell: Cell, windows: Windows) -> Series | None:
        """The series over a cell, in chronological order; None if no image has ``min_valid`` of its pixels."""
        box = self._grid.box(cell)
        found: dict[Date | None, list[Shot]] = {}
        for shot in self.touching(box):
            found.setdefault(self._moment(shot.date), []).append(shot)
        images, num_left_out = [], 0
        for moment in sorted(found, key=lambda m: m or (0, 0, 0)):
            image = self._mosaic(found[moment], box, windows)
            share = 0.0 if image is None else 1.0 if image.bad is None else 1 - float(image.bad.mean())
            if image is not None and share > 0 and share >= self.raster.min_valid:
                images.append(image)
            else:
                num_left_out += 1
        if not images:
            return None
        values, invalid = _stacked([image.bands for image in images])
        masks = {name: _stacked([image.masks[name] for image in images]) for name in self.raster.masks}
        dates, names = tuple(image.date for image in images), tuple(image.name for image in images)
        return Series(values, invalid, dates, names, masks, self._notes(num_left_out))

    def _moment(self, date: Date | None) -> Date | None:
        return (date[0], date[1], 0) if date and self.raster.mosaic == "day" else None

    def _mosaic(self, shots: Sequence[Shot], box: Box, windows: Windows) -> _Image | None:
        """One image: per pixel the first shot in which all bands are valid. None if no shot covers the box.

        Shots whose pixels are copied come before those that are resampled, then by name: the same on any machine.
        """
        result: _Image | None = None
        for shot in sorted(shots, key=lambda s: not self._is_exact(s, box)):
            if result is not None and result.bad is None:
                break
            image = self._image(shot, box, windows)
            if image is not None:
                result = image if result is None else _completed(result, image)
        return result

    def _is_exact(self, shot: Shot, box: Box) -> bool:
        shape = self.raster.size, self.raster.size
        return all(exact_window(s.place, self._grid.crs, box, shape) is not None for s in shot.bands)

    def _image(self, shot: Shot, box: Box, windows: Windows) -> _Image | None:
        shape = (self.raster.num_bands, self.raster.size, self.raster.size)
        bands: Pixels | None = None
        for scene in shot.bands:
            pixels = self._one(scene, box, windows, self.raster.resampling, self.raster.invalid)
            if pixels is None:
                continue
            if scene.ref.bands == tuple(range(self.raster.num_bands)):
                bands = pixels
                break
            if bands is None:
                bands = Pixels(np.zeros(shape, pixels.values.dtype), np.ones(shape, bool))
            bands = _with_bands(bands, pixels, scene.ref.bands)
        if bands is None:
            return None
        masks = {}
        for name in self.raster.masks:
            scene = shot.masks[name]
            found = self._one(scene, box, windows, "nearest", not_finite)
            masks[name] = found or Pixels(
                np.zeros((1, *shape[1:]), scene.dtype), np.ones((1, *shape[1:]), bool)
            )
        for name, marks in self.raster.marks.items():
            if (bad := marks(masks[name])).any():
                bands = Pixels(bands.values, _mask_of(bands) | bad)
        return _Image(bands, masks, shot.date, shot.name)

    def _one(
        self,
        scene: Scene,
        box: Box,
        windows: Windows,
        resampling: Resampling,
        invalid: Invalid,
    ) -> Pixels | None:
        """The pixels of one image over a box; None if it does not cover any of it."""
        crs, shape = self._grid.crs, (self.raster.size, self.raster.size)
        window = exact_window(scene.place, crs, box, shape)
        if window is not None:
            inner = clipped(window, scene.place)
            if inner is None:
                return None
            return padded(_marked(windows.read(scene, inner, box, shape), invalid, scene), inner, window)
        window = source_window(scene.place, crs, box, shape)
        if window is None:
            return None
        pixels = _marked(windows.read(scene, window, box, shape), invalid, scene)
        return resample(pixels, scene.place, window, crs, box, shape[0], resampling)

    def _notes(self, num_left_out: int) -> tuple[str, ...]:
        if not num_left_out:
            return ()
        return (
            f"{self.raster.name} has dates with less than {self.raster.min_valid:.0%} valid pixels: these dates are "
            "left out",
        )


def _marked(pixels: Pixels, invalid: Invalid, scene: Scene) -> Pixels:
    more = invalid(pixels.values, scene.ref.bands)
    if more is None:
        return pixels
    return Pixels(pixels.values, more if pixels.invalid is None else pixels.invalid | more)


def _with_bands(result: Pixels, pixels: Pixels, bands: tuple[int, ...]) -> Pixels:
    """``result`` with these bands; changes its arrays, unless a band needs another type."""
    assert result.invalid is not None
    dtype = np.promote_types(result.values.dtype, pixels.values.dtype)
    values = result.values.astype(dtype, copy=False)
    values[list(bands)] = pixels.values
    result.invalid[list(bands)] = False if pixels.invalid is None else pixels.invalid
    return Pixels(values, result.invalid)


def _completed(result: _Image, other: _Image) -> _Image:
    """``result`` with the pixels of ``other`` where only that has all bands valid."""
    bad, other_bad = result.bad, other.bad
    assert bad is not None
    take = bad if other_bad is None else bad & ~other_bad
    bands = _taken(result.bands, other.bands, take)
    masks = {name: _taken(mask, other.masks[name], take) for name, mask in result.masks.items()}
    return _Image(bands, masks, result.date, result.name)


def _taken(result: Pixels, other: Pixels, take: np.ndarray) -> Pixels:
    values = np.where(take, other.values, result.values)
    if result.invalid is None and other.invalid is None:
        return Pixels(values, None)
    invalid = np.where(take, _mask_of(other), _mask_of(result))
    return Pixels(values, invalid if invalid.any() else None)


def _mask_of(pixels: Pixels) -> np.ndarray:
    return np.zeros(pixels.values.shape, bool) if pixels.invalid is None else pixels.invalid


def _stacked(images: Sequence[Pixels]) -> Pixels:
    values = np.stack([image.values for image in images])
    if all(image.invalid is None or not image.invalid.any() for image in images):
        return Pixels(values, None)
    return Pixels(values, np.stack([_mask_of(image) for image in images]))

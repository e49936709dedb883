"""Crops of a tile: one square on the ground, cut out of the raster of every sensor with the same orientation.

Positions are in metres, because the rasters of a tile differ in resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.datasets.spec_check import EXTENT_TOLERANCE_M, crop_problems
from maestro_scale.errors import dotted
from maestro_scale.stream.orientation import UPRIGHT, Orientation


@dataclass(frozen=True)
class Crop:
    """A square on the ground: upper left corner in metres from the tile's, and orientation."""

    row_m: float = 0.0
    column_m: float = 0.0
    orientation: Orientation = UPRIGHT


class CropGrid:
    """The possible crops of ``crop_m`` metres of a tile; ``spec`` is resolved.

    Offsets are multiples of ``step_m``, the coarsest sensor's pixel, so that the sensors of a crop cover the
    same ground. ValueError if the crop does not fit into the tile, or is smaller and not a multiple of that pixel.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        for path, reason in crop_problems(spec):
            raise ValueError(f"{spec.name}.{dotted(path)}: {reason}")
        self.tile_m, self.crop_m = spec.tile_m, spec.crop_m
        self.step_m = max(spec.modality(s.source).resolution_m for s in spec.sensors)
        self._whole = self.crop_m > self.tile_m - EXTENT_TOLERANCE_M
        # Per axis: offsets of random crops; crops that cover the tile in evaluation, the last moved inwards to fit.
        self.num_offsets = int((self.tile_m - self.crop_m) / self.step_m + EXTENT_TOLERANCE_M) + 1
        self.num_per_side = math.ceil(self.tile_m / self.crop_m - EXTENT_TOLERANCE_M)

    @property
    def num_crops(self) -> int:
        """Number of crops that cover a tile."""
        return self.num_per_side**2

    def at(self, row: int, column: int, orientation: Orientation = UPRIGHT) -> Crop:
        """The crop at an offset of whole steps, each in [0, num_offsets)."""
        return Crop(row * self.step_m, column * self.step_m, orientation)

    def tiling(self, index: int) -> Crop:
        """Crop ``index`` of ``num_crops``, row by row; the last ones overlap if crops do not divide the tile."""
        if not 0 <= index < self.num_crops:
            raise ValueError(f"crop {index} of a tile with {self.num_crops} crops")
        row, column = divmod(index, self.num_per_side)
        return Crop(self._inside(row), self._inside(column))

    def side(self, resolution_m: float, size: int) -> int:
        """Pixels per side of a crop of a raster of ``size`` pixels per side."""
        return size if self._whole else max(round(self.crop_m / resolution_m), 1)

    def window(self, crop: Crop, resolution_m: float, size: int) -> tuple[slice, slice] | None:
        """Rows and columns of the crop's pixels in a raster of ``size`` pixels per side; None for all of them."""
        if self._whole:
            return None
        side = self.side(resolution_m, size)
        top = min(round(crop.row_m / resolution_m), size - side)
        left = min(round(crop.column_m / resolution_m), size - side)
        return slice(top, top + side), slice(left, left + side)

    def cut(self, pixels: np.ndarray, crop: Crop, resolution_m: float) -> np.ndarray:
        """The crop's pixels (…, side, side) of (…, size, size), a view, before the orientation."""
        window = self.window(crop, resolution_m, pixels.shape[-1])
        if window is None:
            return pixels
        rows, columns = window
        return pixels[..., rows, columns]

    def _inside(self, index: int) -> float:
        """Offset in metres of crop ``index`` on one axis, at most tile_m - crop_m, rounded down to whole steps."""
        offset = min(index * self.crop_m, self.tile_m - self.crop_m)
        return int(offset / self.step_m + EXTENT_TOLERANCE_M) * self.step_m

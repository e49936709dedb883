"""The common grid that scenes are cut on: cells of a lattice in a projected CRS, and the key of each cell.

A cell is (column, row); its upper left corner is (origin_x + column · stride, origin_y − row · stride). The lattice is
that of the CRS, not of the data: the same place has the same cell and key whatever scenes and area are given.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maestro_scale.datasets.spec import DatasetError, GeoOrigin

_EPSG = re.compile(r"EPSG:(\d+)", re.IGNORECASE)
_KEY = re.compile(r"(?P<crs>\w+)_(?P<ew>[EW])(?P<x>\d{7,})_(?P<ns>[NS])(?P<y>\d{7,})")
_DECIMALS = 6  # of coordinates in metres: micrometres, so that sums of floats compare equal


class Box(NamedTuple):
    """A rectangle in metres, in the CRS of the grid."""

    west: float
    south: float
    east: float
    north: float

    def intersects(self, other: Box) -> bool:
        """Whether the interiors have a common point."""
        return (
            self.west < other.east
            and other.west < self.east
            and self.south < other.north
            and other.south < self.north
        )

    def union(self, other: Box) -> Box:
        """The smallest box around both."""
        return Box(
            min(self.west, other.west),
            min(self.south, other.south),
            max(self.east, other.east),
            max(self.north, other.north),
        )

    def buffered(self, distance_m: float) -> Box:
        """The box, larger by ``distance_m`` on every side."""
        return Box(
            self.west - distance_m, self.south - distance_m, self.east + distance_m, self.north + distance_m
        )


class Cell(NamedTuple):
    """Column and row of a cell; rows count southwards."""

    col: int
    row: int


@dataclass(frozen=True)
class Grid:
    """Square cells of ``tile_m`` metres, one every ``stride_m`` metres, in the projected CRS ``crs``.

    ``origin``: a corner of the lattice, smaller than a pixel in practice: it aligns the cells with the pixels of the
    scenes, so that their values are copied instead of resampled.
    """

    crs: str
    tile_m: float
    stride_m: float
    origin: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if not (self.tile_m > 0 and self.stride_m >= 1):
            raise DatasetError(
                f"grid: tile_m {self.tile_m:g} and stride_m {self.stride_m:g}: use a tile above 0 and a stride of at "
                "least 1 metre"
            )

    def box(self, cell: Cell) -> Box:
        """The rectangle of a cell."""
        west = round(self.origin[0] + cell.col * self.stride_m, _DECIMALS)
        north = round(self.origin[1] - cell.row * self.stride_m, _DECIMALS)
        return Box(west, round(north - self.tile_m, _DECIMALS), round(west + self.tile_m, _DECIMALS), north)

    def key(self, cell: Cell) -> str:
        """The name of a cell: CRS and upper left corner in whole metres, ``32631_E0399360_N4500480``.

        Letters, digits and underscores only, so that it is safe as a file name.
        """
        box = self.box(cell)
        x, y = math.floor(box.west), math.floor(box.north)
        return f"{crs_name(self.crs)}_{'W' if x < 0 else 'E'}{abs(x):07d}_{'S' if y < 0 else 'N'}{abs(y):07d}"

    def cell(self, key: str) -> Cell:
        """The cell of a key; DatasetError if it is not one of this grid."""
        found = _KEY.fullmatch(key)
        if found and found["crs"] == crs_name(self.crs):
            x = int(found["x"]) * (-1 if found["ew"] == "W" else 1)
            y = int(found["y"]) * (-1 if found["ns"] == "S" else 1)
            # The key has whole metres: the corner is less than a metre east and north of it.
            col = math.ceil(round((x - self.origin[0]) / self.stride_m, 9))
            row = math.floor(round((self.origin[1] - y) / self.stride_m, 9))
            cell = Cell(col, row)
            if self.key(cell) == key:
                return cell
        raise DatasetError(f"tile {key}: is not a cell of the grid; fix the key")

    def origin_of(self, cell: Cell) -> GeoOrigin:
        """Where a cell lies on the ground."""
        box = self.box(cell)
        return GeoOrigin(self.crs, box.west, box.north)

    def ranges(self, box: Box) -> tuple[range, range]:
        """Columns and rows of all cells whose interior has a common point with that of ``box``."""
        # They have west < box.east and west + tile > box.west; likewise from north to south.
        first_col = math.floor(_exact((box.west - self.tile_m - self.origin[0]) / self.stride_m)) + 1
        stop_col = math.ceil(_exact((box.east - self.origin[0]) / self.stride_m))
        first_row = math.floor(_exact((self.origin[1] - box.north - self.tile_m) / self.stride_m)) + 1
        stop_row = math.ceil(_exact((self.origin[1] - box.south) / self.stride_m))
        return range(first_col, stop_col), range(first_row, stop_row)

    def bounds(self, cols: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(N, 4) west, south, east, north of cells."""
        west = np.round(self.origin[0] + cols * self.stride_m, _DECIMALS)
        north = np.round(self.origin[1] - rows * self.stride_m, _DECIMALS)
        return np.stack([west, north - self.tile_m, west + self.tile_m, north], axis=1)


def _exact(number: float) -> float:
    """A number without the rounding error of a division, so that cells that only touch at an edge do not count."""
    return round(number, 9)


def crs_name(crs: str) -> str:
    """A short name of a CRS for keys: the EPSG code, or else a hash of its definition."""
    found = _EPSG.fullmatch(crs)
    return found[1] if found else "crs" + hashlib.sha256(crs.encode()).hexdigest()[:8]


def parse_crs(text: Any, where: str) -> str:
    """The canonical form of a CRS, ``EPSG:32631`` where it has a code, else WKT. DatasetError names ``where``."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    try:
        crs = CRS.from_user_input(text)
    except CRSError as error:
        raise DatasetError(
            f"{where}: {' '.join(str(text).split())[:80]!r} is not a coordinate reference system; use a code such as "
            "EPSG:32631",
            "CRS cannot be read",
        ) from error
    code = crs.to_epsg(min_confidence=70)
    # A code that merely resembles the definition would move pixels: the code must describe the same system.
    if code is not None and CRS.from_epsg(code).equals(crs, ignore_axis_order=True):
        return f"EPSG:{code}"
    return str(crs.to_wkt())

"""Which cells of the grid are tiles: those that the required rasters cover, and whose centre is in the area."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from maestro_scale.datasets.scenes.catalog import outline
from maestro_scale.datasets.scenes.cells import CellRuns
from maestro_scale.datasets.scenes.grid import Box, Grid
from maestro_scale.datasets.scenes.series import SceneSeries
from maestro_scale.datasets.spec import DatasetError

_CELLS_AT_ONCE = 100_000
_ROUNDING = 1e-9  # of the area of a cell
MAX_CELLS = 50_000_000
"""Tiles of a dataset: more is a mistake in ``tile_m`` or in a coordinate."""


@dataclass(frozen=True)
class CellPlan:
    """The cells that are tiles, by row and column, and how many were left out, by reason."""

    cells: CellRuns
    left_out: dict[str, int]


@dataclass(frozen=True)
class AreaOfInterest:
    """Where tiles are wanted: a geometry in the CRS of the grid, and the file it is from."""

    geometry: Any
    file: str


def plan_cells(
    grid: Grid, series: Sequence[SceneSeries], required: Sequence[str], area: AreaOfInterest | None
) -> CellPlan:
    """The cells of which every required raster covers at least its ``min_valid``, by the outlines of its images.

    How many of the pixels there are valid is known only when they are read (``series.FEW_VALID``). DatasetError if
    there are none, with the reason: rasters that do not overlap, an area outside of all scenes, images smaller than a
    tile.
    """
    import shapely

    covers = _covers(grid, series, required)
    _check_overlap({name: cover for name, (cover, _) in covers.items()})
    extents = [Box(*shapely.bounds(cover).tolist()) for cover, _ in covers.values()]
    extent = reduce(_intersection, extents)
    if area is not None:
        bounds = shapely.bounds(area.geometry)
        if not any(shapely.intersects(area.geometry, cover) for cover, _ in covers.values()):
            raise DatasetError(
                f"{area.file}: lies outside of all scenes: it covers {_text(Box(*bounds.tolist()))}, they cover "
                f"{_text(extent)} (metres of {grid.crs}); check its coordinate system",
                "area outside of the scenes",
            )
        extent = _intersection(extent, Box(*bounds.tolist()).buffered(grid.tile_m))
        shapely.prepare(area.geometry)
    left_out: dict[str, int] = {}
    num_area = 0

    def kept() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal num_area
        for cols, rows in _blocks_of_cells(grid, extent):
            bounds = grid.bounds(cols, rows)
            if area is not None:
                centres = (bounds[:, :2] + bounds[:, 2:]) / 2
                inside = shapely.contains_xy(area.geometry, centres[:, 0], centres[:, 1])
                cols, rows, bounds = cols[inside], rows[inside], bounds[inside]
            num_area += len(cols)
            keep = np.ones(len(cols), bool)
            for name, (cover, min_valid) in covers.items():
                share = covered_share(cover, bounds)
                enough = (share >= min_valid - _ROUNDING) & (share > 0)
                touched = keep & ~enough & (share > 0)
                if touched.any():
                    reason = f"are covered by {name} to less than {min_valid:.0%}"
                    left_out[reason] = left_out.get(reason, 0) + int(touched.sum())
                keep &= enough
            yield cols[keep], rows[keep]

    cells = CellRuns.of(kept())
    if not cells:
        _refuse_none(grid, area, num_area, left_out)
    return CellPlan(cells, left_out)


def _covers(
    grid: Grid, series: Sequence[SceneSeries], required: Sequence[str]
) -> dict[str, tuple[Any, float]]:
    """What each required raster covers, and its ``min_valid``; if none is required, what all cover together."""
    import shapely

    there = [s for s in series if s.shots]
    if not required:
        every = shapely.union_all([coverage(s, grid) for s in there])
        return {"any raster": (every, min(s.raster.min_valid for s in there))}
    needed = [s for s in there if s.raster.name in required]
    return {s.raster.name: (coverage(s, grid), s.raster.min_valid) for s in needed}


def coverage(series: SceneSeries, grid: Grid) -> Any:
    """The union of the outlines of a raster's images, as a geometry."""
    import shapely

    places = dict.fromkeys(scene.place for shot in series.shots for scene in shot.bands)
    shapes = []
    for place in places:
        if place.crs == grid.crs and not place.transform[1] and not place.transform[3]:
            points = np.round(outline(place, grid.crs), 6)
            shapes.append(shapely.box(*points.min(axis=0), *points.max(axis=0)))
        else:
            shapes.append(shapely.polygons(outline(place, grid.crs)))
    return shapely.union_all(shapely.make_valid(np.array(shapes, object)))


def covered_share(cover: Any, bounds: np.ndarray) -> np.ndarray:
    """(N,) share of boxes (N, 4) that a geometry covers."""
    import shapely

    shapely.prepare(cover)
    boxes = shapely.box(*bounds.T)
    share = np.zeros(len(bounds))
    inside = shapely.covers(cover, boxes)
    share[inside] = 1
    edge = ~inside & shapely.intersects(cover, boxes)
    share[edge] = shapely.area(shapely.intersection(boxes[edge], cover)) / shapely.area(boxes[edge])
    return share


def _blocks_of_cells(grid: Grid, extent: Box) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    cols, rows = grid.ranges(extent)
    num = len(cols) * len(rows)
    if num > MAX_CELLS:
        raise DatasetError(
            f"grid: {num} tiles between the scenes' corners, more than {MAX_CELLS}; use a larger stride_m or an area"
        )
    step = max(1, _CELLS_AT_ONCE // max(len(cols), 1))
    for start in range(0, len(rows), step):
        part = np.arange(rows.start + start, min(rows.start + start + step, rows.stop), dtype=np.int64)
        every = np.arange(cols.start, cols.stop, dtype=np.int64)
        yield np.tile(every, len(part)), np.repeat(part, len(every))


def _check_overlap(covers: dict[str, Any]) -> None:
    import shapely

    names = list(covers)
    for name in names[1:]:
        if not shapely.intersects(covers[names[0]], covers[name]):
            raise DatasetError(
                f"rasters {names[0]} and {name} do not overlap: the images of {names[0]} cover "
                f"{_text(Box(*shapely.bounds(covers[names[0]]).tolist()))}, those of {name} "
                f"{_text(Box(*shapely.bounds(covers[name]).tolist()))} (metres of grid.crs); check their files, or set "
                f"rasters.{name}.required to false",
                "rasters do not overlap",
            )


def _refuse_none(grid: Grid, area: AreaOfInterest | None, num_area: int, left_out: dict[str, int]) -> None:
    if area is not None and not num_area:
        raise DatasetError(
            f"{area.file}: contains the centre of no tile of {grid.tile_m:g} m; use a smaller tile_m or stride_m, or a "
            "larger area",
            "no tiles",
        )
    why = "".join(f"; {count} tiles {reason}" for reason, count in left_out.items())
    raise DatasetError(
        f"grid: no tile of {grid.tile_m:g} m is covered by the images{why}; use a smaller tile_m or min_valid",
        "no tiles",
    )


def _intersection(a: Box, b: Box) -> Box:
    return Box(max(a.west, b.west), max(a.south, b.south), min(a.east, b.east), min(a.north, b.north))


def _text(box: Box) -> str:
    return f"{box.west:.0f}–{box.east:.0f} E, {box.south:.0f}–{box.north:.0f} N"

"""Windows of scenes: a description with ``grid``, whose cells become overlapping windows of the extent of the model.

What is connected is one map: scenes of two regions do not make one file that is mostly empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.dataset import only
from maestro_scale.datasets.description.sections.splits import Splits
from maestro_scale.datasets.description.splits import WHOLE
from maestro_scale.datasets.scenes.cells import CellRuns, connected
from maestro_scale.datasets.scenes.dataset import SceneTiles, area_of, open_scenes
from maestro_scale.datasets.scenes.grid import Cell
from maestro_scale.datasets.scenes.plan import coverage
from maestro_scale.datasets.spec import DatasetSpec, GeoOrigin, LeftOut
from maestro_scale.inference.errors import InferenceError
from maestro_scale.inference.source import Layout, Piece, read_piece
from maestro_scale.inference.windows import Area
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.stream.crops import Crop

_WHOLE = 0.995  # of an area: outlines in other coordinate systems differ a little


class SceneSource:
    """The windows of scenes. ``spec``: with the sensors of the model; its tiles are windows."""

    def __init__(
        self, spec: DatasetSpec, dataset: SceneTiles, name: str, layout: Layout, area: Any = None
    ) -> None:
        self.spec, self._dataset, self._polygon = spec, dataset, area
        self.notes = _coverage_notes(dataset)
        grid = dataset.reader.grid
        cells = dataset.cells if isinstance(dataset.cells, CellRuns) else CellRuns.of_cells(dataset.cells)
        if area is not None:
            cells = _touching(area, cells, dataset)
        pixel_m, side = layout.resolution_m, max(round(spec.crop_m / layout.resolution_m), 1)
        reach = max(int(grid.tile_m / grid.stride_m - 1e-9), 1)
        groups = connected(cells, reach)
        self.areas: list[Area] = []
        self._origins: list[GeoOrigin] = []
        for group in groups:
            (row, col, _), (last_row, _, stop) = (
                group.runs.min(axis=0).tolist(),
                group.runs.max(axis=0).tolist(),
            )
            corner = grid.box(Cell(col, row))
            norths = [grid.box(Cell(col, r)).north for r in range(row, last_row + 1)]
            wests = [grid.box(Cell(c, row)).west for c in range(col, stop)]
            tops = np.array([round((corner.north - north) / pixel_m) for north in norths], np.int64)
            lefts = np.array([round((west - corner.west) / pixel_m) for west in wests], np.int64)
            label = name if len(groups) == 1 else f"{name}_{grid.key(group[0])}"
            height, width = int(tops[-1]) + side, int(lefts[-1]) + side
            self.areas.append(Area(label, height, width, pixel_m, group, Cell(col, row), tops, lefts, side))
            self._origins.append(GeoOrigin(grid.crs, corner.west, corner.north))

    def read(self, area: int, numbers: np.ndarray, batch_size: int) -> Iterator[Piece]:
        """As of Source."""
        grid = self._dataset.reader.grid
        cells = map(Cell, *(part.tolist() for part in self.areas[area].windows.at(numbers)))
        by_key = {grid.key(cell): n for cell, n in zip(cells, numbers.tolist(), strict=True)}
        for run in self._dataset.runs(list(by_key)):
            with self._dataset.run(run):
                for key in run:
                    try:
                        tile = self._dataset.read(key)
                    except LeftOut:
                        continue  # nothing is measured there
                    sample, origin = Sample(encode(tile)), self._origins[area]
                    piece = read_piece(sample, self.spec, [by_key[key]], [Crop()], origin)
                    if piece is not None:
                        yield piece

    def origin(self, area: int) -> GeoOrigin | None:
        """As of Source."""
        return self._origins[area]

    def digest(self) -> str:
        """As of Source."""
        import shapely

        sha = hashlib.sha256()
        for part in _text([area.windows for area in self.areas], self._origins):
            sha.update(part.encode())
        for series in self._dataset.reader.series:
            for shot in series.shots:
                sizes = [_local_bytes(scene.ref.address) for scene in shot.scenes]
                found = (series.raster.name, shot.name, shot.date, sizes)
                sha.update(repr(found).encode(errors="surrogatepass"))
        sha.update(b"" if self._polygon is None else shapely.to_wkb(self._polygon))
        return sha.hexdigest()

    def outside(self, area: int, box: tuple[int, int, int, int]) -> np.ndarray | None:
        """(height, width) bool of a part of a map, where it is outside of the area of interest; None: all is inside."""
        if self._polygon is None:
            return None
        from rasterio.features import geometry_mask
        from rasterio.transform import from_origin

        top, left, height, width = box
        pixel_m, corner = self.areas[area].resolution_m, self._origins[area]
        transform = from_origin(
            corner.west_m + left * pixel_m, corner.north_m - top * pixel_m, pixel_m, pixel_m
        )
        mask: np.ndarray = geometry_mask([self._polygon], (height, width), transform)
        return mask


def _coverage_notes(dataset: SceneTiles) -> tuple[str, ...]:
    """What is not mapped because a required raster does not cover it."""
    import shapely

    optional = {m.name for m in dataset.spec.modalities if m.optional}
    covers = {
        s.raster.name: coverage(s, dataset.reader.grid)
        for s in dataset.reader.series
        if s.shots and s.raster.name not in optional
    }
    whole = shapely.area(shapely.union_all(list(covers.values())))
    shares = {name: shapely.area(cover) / whole for name, cover in covers.items() if whole}
    return tuple(
        f"{name} covers {share:.0%} of what all rasters cover; the rest is not mapped, unless rasters.{name}.required "
        "is false"
        for name, share in shares.items()
        if share < _WHOLE
    )


def _text(groups: Sequence[CellRuns], origins: Sequence[GeoOrigin]) -> Iterator[str]:
    """The text of a list of lists of cells, and of one of origins, in parts."""
    yield "(["
    for number, group in enumerate(groups):
        separator = ", [" if number else "["
        for cols, rows in group.blocks():
            cells = zip(cols.tolist(), rows.tolist(), strict=True)
            yield separator + ", ".join(f"Cell(col={col}, row={row})" for col, row in cells)
            separator = ", "
        yield "]"
    yield f"], {list(origins)!r})"


def _local_bytes(address: str) -> int | None:
    """The size of a file on this machine; None of others. A file that was replaced has another size, mostly; its time
    may differ between nodes that have copies."""
    try:
        return Path(address).stat().st_size
    except (OSError, ValueError):
        return None


def open_scene_source(description: Description, src: str, spec: DatasetSpec, layout: Layout) -> SceneSource:
    """The scenes of a description below ``src``. ``spec``: of the model on this description, with a tile of ``crop_m``.

    Splits, targets and ``min_valid`` of the description do not count: every place where something is measured is
    mapped, within the area of interest.
    """
    grid = description.grid
    assert grid is not None
    polygon = None
    needed = list(dict.fromkeys(s.source for s in spec.sensors))
    cut = only(description, needed)
    rasters = {n: r and r.model_copy(update={"nodata_mask": True}) for n, r in cut.rasters.items()}
    windows = cut.model_copy(
        update={
            "tile_m": spec.crop_m,
            "crop_m": spec.crop_m,
            "targets": {},
            "splits": Splits(),
            "rasters": rasters,
            "grid": grid.model_copy(update={"stride_m": layout.stride_m, "area": None, "min_valid": 0.0}),
        }
    )
    dataset = open_scenes(windows, src, WHOLE)
    if grid.area is not None:
        polygon = area_of(grid.area, src, dataset.reader.grid.crs)
    spec = replace(spec, tile_m=spec.crop_m, modalities=dataset.spec.modalities)
    return SceneSource(spec, dataset, description.name, layout, polygon)


def _touching(area: Any, cells: CellRuns, dataset: SceneTiles) -> CellRuns:
    import shapely

    shapely.prepare(area)

    def touching() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for cols, rows in cells.blocks():
            hit = shapely.intersects(area, shapely.box(*dataset.reader.grid.bounds(cols, rows).T))
            yield cols[hit], rows[hit]

    found = CellRuns.of(touching())
    if not found:
        raise InferenceError("grid.area: lies outside of all scenes; check its coordinate system")
    return found

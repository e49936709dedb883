"""Tiles cut from scenes by a description with ``grid``: random access to the cells of one split.

The same assembly as for tiles from files (description/tile.py) makes the tile of the windows of a cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from maestro_scale.datasets.description.assemble import Place, Stack, mask_band
from maestro_scale.datasets.description.blocks import draw_blocks, left_out
from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.index import SectionImages, list_sections, sections
from maestro_scale.datasets.description.sections.grid import Area
from maestro_scale.datasets.description.sections.images import ImageFiles, MaskRule
from maestro_scale.datasets.description.sections.rasters import Raster
from maestro_scale.datasets.description.sections.splits import SplitBlocks
from maestro_scale.datasets.description.sections.targets import Target as TargetKeys
from maestro_scale.datasets.description.spec import dataset_spec, settings_of
from maestro_scale.datasets.description.splits import select
from maestro_scale.datasets.description.targets import TableLabels, TargetReader, label_image
from maestro_scale.datasets.description.tile import MaskImages, RasterImages, make_tile
from maestro_scale.datasets.description.vector_targets import VectorLabels
from maestro_scale.datasets.description.vectors import read_area
from maestro_scale.datasets.quantity import QUANTITY_KINDS
from maestro_scale.datasets.scenes.catalog import (
    Layer,
    SourceOpener,
    common_crs,
    locate,
    pixel_phase,
    placed,
    shots,
)
from maestro_scale.datasets.scenes.grid import Box, Cell, Grid
from maestro_scale.datasets.scenes.images import Scene
from maestro_scale.datasets.scenes.plan import AreaOfInterest, CellPlan, plan_cells
from maestro_scale.datasets.scenes.problems import Problems
from maestro_scale.datasets.scenes.reader import SceneReader
from maestro_scale.datasets.scenes.series import FEW_VALID, SceneRaster, SceneSeries, Series
from maestro_scale.datasets.scenes.warp import Pixels
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import NODATA, DatasetError, DatasetSpec, LeftOut, Target, Tile
from maestro_scale.datasets.values import extremes
from maestro_scale.errors import did_you_mean


def open_scenes(description: Description, src: str, split: str) -> SceneTiles:
    """Split ``split`` of scenes below ``src`` that are cut on the grid of the description.

    Opens every file once, for where it lies. Raises DatasetError with a line per kind of problem: files that cannot be
    read or do not say where they lie, coordinate systems that differ, rasters that do not overlap, an area outside of
    all scenes.
    """
    assert description.grid is not None
    spec = dataset_spec(description)
    _check_split(description, split)
    images = list_sections(description, src, split, by_tile=False)
    opener = SourceOpener({where: found.section for where, found in images.items()})
    problems = Problems()
    located = {
        where: locate(_layer(found, problems), src, opener, problems) for where, found in images.items()
    }
    problems.check(src)
    grid = _grid(description, located)
    located = {where: placed(scenes, grid.crs, problems) for where, scenes in located.items()}
    series = [_raster_series(description, m.name, m.size, located, grid, problems) for m in spec.modalities]
    labels = [
        _label_series(t, description, located, grid, problems)
        for t in spec.targets
        if _label_layer(t) in located
    ]
    problems.check(src)
    cells, num_left_out = _cells(description, spec, src, split, grid, series)
    reader = SceneReader(grid, [*series, *labels], opener)
    targets = _target_reader(description, spec, src, reader, cells)
    for vectors in targets.vectors.values():
        if isinstance(vectors, VectorLabels):
            vectors.check_overlap(grid.crs, reduce(Box.union, (s.extent for s in series if s.shots)))
    return SceneTiles(description, spec, reader, cells, targets, num_left_out)


@dataclass
class SceneTiles:
    """The cells of a grid (a :class:`~maestro_scale.datasets.spec.RawDataset` that can be read in runs).

    ``left_out``: numbers of cells that are no tiles of any split, by reason.
    """

    description: Description
    spec: DatasetSpec
    reader: SceneReader
    cells: Sequence[Cell]
    targets: TargetReader
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """As of :class:`~maestro_scale.datasets.spec.RawDataset`."""
        return settings_of(self.description)

    def keys(self) -> list[str]:
        """Sorted tile keys: coordinate system and upper left corner of each cell."""
        return sorted(map(self.reader.grid.key, self.cells))

    def read(self, key: str) -> Tile:
        """One tile. LeftOut where a required raster has few valid pixels; DatasetError that names file and cause."""
        grid = self.reader.grid
        cell = grid.cell(key)
        notes: list[str] = []
        found: dict[str, RasterImages] = {}
        for modality in self.spec.modalities:
            series = self.reader.read_one(modality.name, cell)
            raster = _raster(self.description, modality.name)
            if series is not None:
                notes += series.notes
                found[modality.name] = _images(raster, modality.name, series, grid, cell)
            elif not modality.optional:
                raise LeftOut(
                    f"tile {key}: {modality.name} has no image with enough valid pixels (grid.min_valid)",
                    FEW_VALID,
                )
        if not found:
            raise LeftOut(f"tile {key}: no raster has an image with enough valid pixels", FEW_VALID)
        place = _place(grid, cell, next(iter(found.values())).stack)
        labels, _ = self.targets.read(key, {}, place, notes)
        return make_tile(self.description, self.spec, key, found, labels, grid.origin_of(cell), notes)

    def runs(self, keys: Sequence[str]) -> list[list[str]]:
        """As :class:`~maestro_scale.datasets.spec.InRuns`: strips of the grid."""
        grid = self.reader.grid
        return [[grid.key(cell) for cell in run] for run in self.reader.runs([grid.cell(k) for k in keys])]

    @contextmanager
    def run(self, keys: Sequence[str]) -> Iterator[None]:
        """As :class:`~maestro_scale.datasets.spec.InRuns`."""
        grid = self.reader.grid
        cells = [grid.cell(key) for key in keys]
        box = grid.box(cells[0])
        for cell in cells[1:]:
            box = box.union(grid.box(cell))
        for labels in self.targets.vectors.values():
            if isinstance(labels, VectorLabels):
                labels.prepare(grid.crs, box)
        with self.reader.run(cells):
            yield

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cells": ()}  # a writer process is given the keys that it reads


@dataclass(frozen=True)
class NotMeasured:
    """Finds the values of a raster's files that are no measurement: declared by the description, or impossible.

    They count as invalid for ``min_valid``, and have no weight where an image is resampled.
    """

    raster: Raster

    def __call__(self, values: np.ndarray, bands: tuple[int, ...]) -> np.ndarray | None:
        """As :data:`.series.Invalid`."""
        raster, quantity = self.raster, QUANTITY_KINDS[self.raster.quantity]
        if raster.valid is not None:
            quantity = quantity.within(*raster.valid)
        names = [raster.bands[band].name for band in bands]
        bad = np.zeros(values.shape, bool)
        for number in raster.nodata:
            bad |= np.isnan(values) if np.isnan(number) else values == number
        lowest, highest = sorted(v * raster.scale + raster.offset for v in extremes(values))
        if not (lowest > quantity.above and highest <= quantity.up_to):  # also if they are NaN
            bad |= ~quantity.valid(values * np.float64(raster.scale) + raster.offset)
        for i, name in enumerate(names):
            if name in quantity.nonzero:
                bad[i] |= values[i] == 0
        return bad if bad.any() else None


@dataclass(frozen=True)
class Marked:
    """Finds the pixels that a mask rule marks."""

    rule: MaskRule
    where: str

    def __call__(self, mask: Pixels) -> np.ndarray:
        """(n, n) bool of a mask (1, n, n)."""
        return mask_band(self.rule, mask.values, mask.invalid, self.where, NODATA, [])[0] > 0


@dataclass(frozen=True)
class SceneLabels:
    """Reads a target that is a label image in scenes."""

    target: Target
    keys: TargetKeys
    reader: SceneReader

    def __call__(self, key: str, place: Place | None, notes: list[str]) -> np.ndarray:
        """The label image of a cell; pixels that no image covers have no label."""
        cell = self.reader.grid.cell(key)
        series = self.reader.read_one(_label_layer(self.target), cell)
        if series is None:
            raise LeftOut(f"tile {key}: {self.target.name} has no image here", f"no {self.target.name}")
        stack = Stack(series.values, series.invalid, series.dates, ((),), series.names[0])
        return label_image(self.target, self.keys, stack, notes)


def _check_split(description: Description, split: str) -> None:
    for name, raster in description.rasters.items():
        if raster is not None and raster.window is not None:
            raise DatasetError(
                f"rasters.{name}.window: excludes grid, which says where tiles begin; leave it out"
            )
    blocks = description.splits.blocks
    if blocks is not None and split not in blocks.fractions:
        raise DatasetError(
            f"splits.blocks.fractions: has no split {split!r}{did_you_mean(split, blocks.fractions)}"
        )


def _layer(found: SectionImages, problems: Problems) -> Layer:
    """The images of a section, with the dates that are listed for their files."""
    refs = []
    for key, of_key in found.by_key.items():
        for ref in of_key:
            try:
                (date,) = found.dates.of(key, [ref.address], 1)
            except DatasetError as error:
                problems.add(f"images of {found.where} have no listed date", str(error))
                continue
            refs.append(ref if date is None else replace(ref, date=date))
    return Layer(found.where, found.section, tuple(refs))


def _grid(description: Description, located: Mapping[str, Sequence[Scene]]) -> Grid:
    keys = description.grid
    assert keys is not None
    name, raster = next((n, r) for n, r in description.rasters.items() if r is not None)
    first = located[f"rasters.{name}"]
    crs = common_crs(keys.crs, first)
    origin = keys.origin or pixel_phase(first, crs, raster.resolution_m)
    return Grid(crs, description.tile_m, keys.stride_m or description.tile_m, (origin[0], origin[1]))


def _raster_series(
    description: Description,
    name: str,
    size: int,
    located: Mapping[str, Sequence[Scene]],
    grid: Grid,
    problems: Problems,
) -> SceneSeries:
    raster = _raster(description, name)
    where = f"rasters.{name}"
    masks = {mask: located[f"{where}.masks.{mask}"] for mask in raster.masks}
    found = shots(located[where], masks, len(raster.bands), problems)
    if raster.series:
        for shot in found:
            if shot.date is None:
                problems.add(f"images of {name} have no date", shot.name, f"say where it is: {where}.dates")
    assert description.grid is not None
    settings = SceneRaster(
        name,
        len(raster.bands),
        size,
        raster.resampling,
        description.grid.min_valid,
        tuple(raster.masks),
        "day" if raster.series else "all",
        NotMeasured(raster),
        {NODATA: Marked(raster.masks[NODATA], f"{where}.masks.{NODATA}")} if NODATA in raster.masks else {},
    )
    return SceneSeries(settings, found, grid)


def _label_series(
    target: Target,
    description: Description,
    located: Mapping[str, Sequence[Scene]],
    grid: Grid,
    problems: Problems,
) -> SceneSeries:
    layer = _label_layer(target)
    keys = description.targets[target.name]
    assert keys is not None
    assert keys.raster is not None
    assert target.resolution_m is not None
    size = round(description.tile_m / target.resolution_m)
    found = shots(located[layer], {}, 1, problems)
    settings = SceneRaster(
        layer,
        1,
        size,
        "nearest",
        0.0,
        (),
        "all",
        Declared(keys.raster),
    )
    return SceneSeries(settings, found, grid)


@dataclass(frozen=True)
class Declared:
    """Finds values of a label image that its section declares as nodata."""

    section: ImageFiles

    def __call__(self, values: np.ndarray, bands: tuple[int, ...]) -> np.ndarray | None:
        """As :data:`.series.Invalid`."""
        bad = np.isin(values, self.section.nodata)
        if values.dtype.kind == "f":
            bad |= np.isnan(values)
        return bad if bad.any() else None


def _cells(
    description: Description,
    spec: DatasetSpec,
    src: str,
    split: str,
    grid: Grid,
    series: Sequence[SceneSeries],
) -> tuple[Sequence[Cell], dict[str, int]]:
    """The cells of the split, and how many are in none, by reason."""
    keys = description.grid
    assert keys is not None
    area = None
    if keys.area is not None:
        area = AreaOfInterest(area_of(keys.area, src, grid.crs), remote.join(src, keys.area.file))
    required = [m.name for m in spec.modalities if not m.optional]
    plan = plan_cells(grid, series, required, area)
    if description.splits.blocks is not None:
        return _drawn(description.splits.blocks, split, grid, plan)
    patterns = [section.files or "" for section in sections(description).values()]
    by_folder = any("{split}" in pattern for pattern in patterns)
    if description.splits.lists is None and description.splits.column is None:
        select(description.splits, src, split, [], by_folder)
        return plan.cells, plan.left_out
    cells = {grid.key(cell): cell for cell in plan.cells}
    chosen, listing = select(description.splits, src, split, sorted(cells), by_folder)
    unknown = [key for key in chosen if key not in cells]
    if unknown:
        raise DatasetError(
            f"{listing}: {len(unknown)} of its {len(chosen)} tiles are not covered by the scenes, the first: "
            f"{unknown[0]}; remove them"
        )
    return [cells[key] for key in chosen], plan.left_out


def area_of(area: Area, src: str, crs: str) -> Any:
    """The area of interest of a description, in ``crs``. DatasetError that names file and cause."""
    return read_area(remote.join(src, area.file), crs, area.layer, area.crs)


def _drawn(blocks: SplitBlocks, split: str, grid: Grid, plan: CellPlan) -> tuple[list[Cell], dict[str, int]]:
    cols, rows = np.array(plan.cells, np.int64).T
    drawn = draw_blocks(
        grid.bounds(cols, rows),
        size_m=blocks.size_m,
        fractions=blocks.fractions,
        distance_m=blocks.distance_m,
        seed=blocks.seed,
    )
    chosen = [cell for cell, of in zip(plan.cells, drawn.splits, strict=True) if of == split]
    return chosen, {**plan.left_out, **left_out(blocks, split, drawn)}


def _target_reader(
    description: Description, spec: DatasetSpec, src: str, reader: SceneReader, cells: Sequence[Cell]
) -> TargetReader:
    sections_of = {name: section for name, section in description.targets.items() if section is not None}
    of_tables = [t for t in spec.targets if sections_of[t.name].table is not None]
    keys = list(map(reader.grid.key, cells)) if of_tables else []
    tables = {t.name: TableLabels.load(t, sections_of[t.name], src, keys) for t in of_tables}
    made: dict[str, SceneLabels | VectorLabels] = {}
    for target in spec.targets:
        section = sections_of[target.name]
        if section.raster is not None:
            made[target.name] = SceneLabels(target, section, reader)
        elif section.vector is not None:
            made[target.name] = VectorLabels(target, section, src, description.tile_m)
    return TargetReader(spec, sections_of, {}, tables, made)


def _images(raster: Raster, name: str, series: Series, grid: Grid, cell: Cell) -> RasterImages:
    address = series.names[0]
    names = ((),) * len(series.dates)
    stack = Stack(series.values, series.invalid, series.dates, names, address)
    masks = {}
    for mask in raster.masks:
        values, invalid = series.masks[mask]
        masks[mask] = MaskImages(values[:, 0], None if invalid is None else invalid[:, 0], address)
    return RasterImages(replace(stack, place=_place(grid, cell, stack)), masks)


def _place(grid: Grid, cell: Cell, stack: Stack) -> Place:
    box = grid.box(cell)
    return Place(stack.address, grid.crs, box.west, box.north, grid.tile_m / stack.values.shape[-1])


def _label_layer(target: Target) -> str:
    return f"targets.{target.name}.raster"


def _raster(description: Description, name: str) -> Raster:
    raster = description.rasters[name]
    assert raster is not None
    return raster

"""Cells of scenes equal the pixels that plain reading gives; mosaics, series and runs are deterministic."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from testkit.scene_files import READS, located_shots, open_tiff, scene_ref, utm_grid, write_scene

from maestro_scale.datasets.scenes import runs as order
from maestro_scale.datasets.scenes.grid import Box, Cell
from maestro_scale.datasets.scenes.reader import SceneReader
from maestro_scale.datasets.scenes.series import SceneRaster, SceneSeries

WEST, NORTH = 499_840.0, 5_000_000.0  # a multiple of 320
SIZE = 32


def image(seed: int, num_bands: int = 1, side: int = 128, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 4000, (num_bands, side, side)).astype(dtype)


def reader_of(shots, grid, num_bands=1, min_valid=0.5, resampling="bilinear", masks=()) -> SceneReader:
    raster = SceneRaster("s2", num_bands, SIZE, resampling, min_valid, masks)
    return SceneReader(grid, [SceneSeries(raster, shots, grid)], open_tiff)


def all_cells(grid, reader) -> list[Cell]:
    cols, rows = grid.ranges(reduce(Box.union, (shot.box for shot in reader.series[0].shots)))
    return [Cell(col, row) for row in rows for col in cols]


def test_pixels_on_the_grid_are_copied(tmp_path):
    values = image(0, 2)
    path = write_scene(tmp_path / "a.tif", values, WEST, NORTH)
    grid = utm_grid()
    reader = reader_of(located_shots([scene_ref(path, (2020, 5, 0), (0, 1))], tmp_path, grid.crs, 2), grid, 2)
    cells = all_cells(grid, reader)
    assert len(cells) == 16
    for cell in cells:
        series = reader.read(cell)["s2"]
        box = grid.box(cell)
        row, col = round((NORTH - box.north) / 10), round((box.west - WEST) / 10)
        np.testing.assert_array_equal(series.values[0], values[:, row : row + SIZE, col : col + SIZE])
        assert series.invalid is None
        assert series.dates == ((2020, 5, 0),)


@pytest.mark.parametrize(
    ("shift", "crs"),
    [
        ((0.0, 0.0), "EPSG:32631"),
        ((130.0, -70.0), "EPSG:32631"),
        ((3.0, 0.0), "EPSG:32631"),
        ((0.0, 0.0), "EPSG:32632"),
    ],
    ids=["aligned", "offset", "resampled", "another zone"],
)
def test_a_run_gives_what_single_reads_give_and_reads_blocks_once(tmp_path, monkeypatch, shift, crs):
    from pyproj import Transformer

    monkeypatch.setattr(order, "_MIN_BLOCKS", 100)  # else a run of so few cells is mostly edges
    x, y = WEST + shift[0], NORTH + shift[1]
    if crs != "EPSG:32631":
        x, y = (round(v, -1) for v in Transformer.from_crs("EPSG:32631", crs, always_xy=True).transform(x, y))
    refs = []
    for day in (1, 2):
        values = image(day, 1, 192)
        values[:, :30, :50] = 0
        path = write_scene(tmp_path / f"{day}.tif", values, x, y, crs=crs, nodata=0)
        refs.append(scene_ref(path, (2020, day, 0)))
    grid = utm_grid()
    reader = reader_of(located_shots(refs, tmp_path, grid.crs), grid, min_valid=0.3)
    cells = all_cells(grid, reader)
    single = {cell: reader.read(cell)["s2"] for cell in cells}
    assert sum(s is not None for s in single.values()) > 20
    READS.clear()
    seen = []
    for run in reader.runs(cells):
        with reader.run(run):
            for cell in run:
                seen.append(cell)
                series = reader.read(cell)["s2"]
                if single[cell] is None:
                    assert series is None
                    continue
                np.testing.assert_array_equal(series.values, single[cell].values)
                assert (series.invalid is None) == (single[cell].invalid is None)
                if series.invalid is not None:
                    np.testing.assert_array_equal(series.invalid, single[cell].invalid)
    assert sorted(seen) == sorted(cells)
    assert sum(READS) <= 2 * 192 * 192 * 1.5

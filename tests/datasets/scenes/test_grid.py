"""Cells, their keys, and which of them the images cover."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_scale.datasets.scenes.catalog import pixel_phase
from maestro_scale.datasets.scenes.grid import Box, Cell, Grid, crs_name, parse_crs
from maestro_scale.datasets.scenes.images import Scene
from maestro_scale.datasets.scenes.warp import Placement
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.escaping import file_name

strides = st.sampled_from([1.0, 51.2, 102.4, 320.0, 1280.0])
numbers = st.integers(-8000, 8000)


@settings(deadline=None)
@given(strides, numbers, numbers, st.sampled_from([(0.0, 0.0), (15.0, 15.0), (0.2, 7.6)]))
def test_a_key_names_its_cell_and_is_safe_as_a_file_name(stride, col, row, origin):
    grid = Grid("EPSG:2154", max(stride, 60.0), stride, origin)
    key = grid.key(Cell(col, row))
    assert grid.cell(key) == (col, row)
    assert file_name(key) == key
    assert grid.key(Cell(col + 1, row)) != key != grid.key(Cell(col, row + 1))


def test_a_key_says_where_the_tile_lies():
    grid = Grid("EPSG:32631", 1280, 1280)
    assert grid.key(Cell(312, -3516)) == "32631_E0399360_N4500480"
    assert grid.key(Cell(-1, 1)) == "32631_W0001280_S0001280"
    for other in ("32632_E0399360_N4500480", "32631_E0399361_N4500480", "tile", "../x"):
        with pytest.raises(DatasetError, match=f"{re.escape(other)}: is not a cell of the grid"):
            grid.cell(other)


@settings(max_examples=40, deadline=None)
@given(strides, st.floats(-1e5, 1e5), st.floats(-1e5, 1e5), st.floats(1, 5e3), st.floats(1, 5e3))
def test_the_cells_of_a_box_are_those_that_it_touches(stride, west, south, width, height):
    grid = Grid("EPSG:2154", 1.5 * stride, stride)
    box = Box(west, south, west + min(width, 9 * stride), south + min(height, 9 * stride))
    cols, rows = grid.ranges(box)
    for col in range(cols.start - 2, cols.stop + 2):
        for row in range(rows.start - 2, rows.stop + 2):
            inside = col in cols and row in rows
            cell = grid.box(Cell(col, row))
            # Less than the rounding of coordinates does not decide.
            assert inside or not cell.buffered(-1e-5).intersects(box)
            assert not inside or cell.buffered(1e-5).intersects(box)


def test_a_crs_has_one_name_however_it_is_written():
    from pyproj import CRS

    assert parse_crs("epsg:32631", "x") == "EPSG:32631"
    assert parse_crs(CRS.from_epsg(2154).to_wkt(), "x") == "EPSG:2154"
    local = CRS.from_proj4("+proj=tmerc +lat_0=1 +lon_0=3 +datum=WGS84 +units=m").to_wkt()
    assert parse_crs(local, "x") == local
    assert re.fullmatch("crs[0-9a-f]{8}", crs_name(local))
    with pytest.raises(DatasetError, match=r"a\.tif: 'nonsense' is not a coordinate reference system"):
        parse_crs("nonsense", "a.tif")


def test_the_grid_begins_where_the_pixels_of_most_scenes_begin():
    def scene(west: float, north: float, pixel: float = 30.0, crs: str = "EPSG:32631") -> Scene:
        place = Placement(crs, (pixel, 0, west, 0, -pixel, north), 10, 10)
        return Scene("s", ImageRef("a", None, None, (0,)), "a", place, "uint8", Box(0, 0, 1, 1))

    scenes = [
        scene(399_915, 4_500_015),
        scene(300_015, 45),
        scene(0, 0),
        scene(5, 5, crs="EPSG:32632"),
        scene(1, 1, 10),
    ]
    assert pixel_phase(scenes, "EPSG:32631", 30.0) == (15.0, 15.0)
    assert pixel_phase([scene(29.99999, 60.00001)], "EPSG:32631", 30.0) == (0.0, 0.0)
    assert pixel_phase(scenes, "EPSG:2154", 30.0) == (0.0, 0.0)


def test_shares_of_cells_that_a_geometry_covers():
    import shapely

    from maestro_scale.datasets.scenes.plan import covered_share

    cover = shapely.union_all([shapely.box(0, 0, 10, 10), shapely.box(10, 0, 15, 10)])
    boxes = np.array(
        [[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [15, 0, 25, 10], [0, 5, 10, 15]], float
    )
    np.testing.assert_allclose(covered_share(cover, boxes), [1, 1, 0.5, 0, 0.5])

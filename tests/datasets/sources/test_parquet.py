"""Rows of Parquet files with the bytes of images."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest
from datasets.sources.kit import CRS, TRANSFORM, cube, place, read, refs_of, section, stack
from pyarrow import parquet
from rasterio import Affine
from rasterio.io import MemoryFile

from maestro_scale.datasets.sources import parquet as source
from maestro_scale.datasets.sources.protocol import Window
from maestro_scale.datasets.spec import DatasetError


def geotiff(values: np.ndarray, **profile: object) -> bytes:
    """(C, H, W) as the bytes of a GeoTIFF."""
    grid = {
        "count": len(values),
        "height": values.shape[1],
        "width": values.shape[2],
        "dtype": values.dtype.name,
    }
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", crs=CRS, transform=Affine(*TRANSFORM), **grid, **profile) as raster:
            raster.write(values)
        return bytes(memory.read())


def rows(**columns: object) -> pa.Table:
    values = cube()
    return pa.table(
        {
            "grid_cell": ["1U_2R", "3D_4L", "5U_6R"],
            "timestamp": [datetime.datetime(2021, 3, 1, 9, 5), datetime.datetime(2021, 4, 10),
                          datetime.datetime(2021, 12, 31)],
            "B02": [geotiff(v[:1], nodata=84) for v in values],
            "B03": [geotiff(v[1:]) for v in values],
            **columns,
        }
    )  # fmt: skip


@pytest.mark.parametrize("row_group_size", [1, 3])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_column_per_band(tmp_path, row_group_size, is_streamed, monkeypatch):
    parquet.write_table(rows(), tmp_path / "part_1.parquet", row_group_size=row_group_size)
    if is_streamed:
        monkeypatch.setattr(source, "_MAX_GROUP_BYTES", 0)
    files = section("part_*.parquet", bands=["B02", "B03"], variable="{band}", keys="grid_cell")
    refs = refs_of(files, tmp_path)
    assert [(r.key, r.date) for r in refs] == [
        ("1U_2R", (2021, 60, 9)), ("3D_4L", (2021, 100, 0)), ("5U_6R", (2021, 365, 0))
    ]  # fmt: skip
    np.testing.assert_array_equal(stack(files, refs), cube())
    assert read(files, refs[0]).invalid is None
    invalid = read(files, refs[1]).invalid
    assert (invalid[0].sum(), invalid[1].sum(), invalid[0, 0, 0]) == (1, 0, True)
    part = read(files, refs[1], Window(1, 2, 3, 4))
    np.testing.assert_array_equal(part.values, cube()[1, :, 1:4, 2:6])
    assert place(files, refs[2]) == (CRS, TRANSFORM)
    assert refs_of(section("part_*.parquet", bands=["B03", "B02"]), tmp_path)[2].key == "2"


def test_one_column_with_all_bands(tmp_path):
    """Structs of bytes and a path, as the datasets library writes them; days as text; split from the path."""
    table = pa.table(
        {
            "image": [{"bytes": geotiff(v), "path": "x.tif"} for v in cube()],
            "day": ["20210301", "20210410", "20211231"],
        }
    )
    (tmp_path / "train").mkdir()
    parquet.write_table(table, tmp_path / "train" / "0.parquet")
    dates = {"from": "coordinate", "coordinate": "day"}
    files = section("{split}/{part}.parquet", bands=[{"name": "q", "from": 2}], dates=dates)
    refs = refs_of(files, tmp_path)
    assert [(r.key, r.split, r.date) for r in refs] == [
        ("0", "train", (2021, 60, 0)), ("1", "train", (2021, 100, 0)), ("2", "train", (2021, 365, 0))
    ]  # fmt: skip
    np.testing.assert_array_equal(stack(files, refs), cube()[:, 1:])


def test_bad_rows_are_one_line(tmp_path):
    parquet.write_table(rows(B02=[None, b"no image", geotiff(cube(height=3)[0][:1])]), tmp_path / "a.parquet")
    files = section("a.parquet", bands=["B02", "B03"], variable="{band}", keys="grid_cell")
    refs = refs_of(files, tmp_path)
    for ref, message in zip(
        refs,
        [
            "B02 of 1U_2R is empty",
            "B02 of 3D_4L: cannot be read",
            "B03 of 5U_6R: is int16 6×7, not on the grid of",
        ],
        strict=True,
    ):
        with pytest.raises(DatasetError, match=f"a.parquet: {message}"):
            read(files, ref)
    parquet.write_table(
        rows(grid_cell=["a", None, ""], timestamp=["x", "2021-01-01", "y"]), tmp_path / "b.parquet"
    )
    with pytest.raises(DatasetError, match="column grid_cell has 2 empty keys"):
        refs_of(section("b.parquet", variable="B02", keys="grid_cell"), tmp_path)
    with pytest.raises(DatasetError, match=r"'x' is not a date .*\(2 of 3 dates\)"):
        refs_of(section("b.parquet", variable="B02"), tmp_path)
    with pytest.raises(DatasetError, match=r"has no column 'grid_cel' \(did you mean 'grid_cell'"):
        refs_of(section("b.parquet", variable="B02", keys="grid_cel"), tmp_path)
    files = section("b.parquet", dates={"from": "constant", "date": "2020-01-01"})
    with pytest.raises(DatasetError, match=r"set variable \(there are B02, B03\)"):
        read(files, refs_of(files, tmp_path)[0])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"b\.parquet: cannot be read"):
        refs_of(files, tmp_path)

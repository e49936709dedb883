"""Several scenes of a date, bands and masks in files of their own, and resampling."""

from __future__ import annotations

import numpy as np
import pytest
from testkit.scene_files import located_shots, open_tiff, scene_ref, utm_grid, write_scene

from maestro_scale.datasets.scenes.grid import Cell
from maestro_scale.datasets.scenes.reader import SceneReader
from maestro_scale.datasets.scenes.series import SceneRaster, SceneSeries, Series
from maestro_scale.datasets.scenes.warp import RESAMPLINGS, Pixels, Placement, resample
from maestro_scale.datasets.spec import DatasetError

WEST, NORTH, SIZE = 499_840.0, 5_000_000.0, 32
CELL = Cell(1562, -15625)
DAY = (2020, 100, 10)


def read(shots, num_bands=1, min_valid=0.5, resampling="bilinear", masks=(), mosaic="day") -> Series | None:
    grid = utm_grid()
    assert grid.box(CELL)[::3] == (WEST, NORTH)
    raster = SceneRaster("s2", num_bands, SIZE, resampling, min_valid, masks, mosaic)
    return SceneReader(grid, [SceneSeries(raster, shots, grid)], open_tiff).read(CELL)["s2"]


def filled(value: int, hole: slice | None = None, side: int = SIZE) -> np.ndarray:
    values = np.full((1, side, side), value, "uint16")
    if hole is not None:
        values[:, :, hole] = 0
    return values


def shots_of(tmp_path, files, **options):
    refs = []
    for name, (values, date) in files.items():
        path = write_scene(tmp_path / f"{name}.tif", values, WEST, NORTH, nodata=0)
        refs.append(scene_ref(path, date, tile=name))
    return located_shots(refs, tmp_path, "EPSG:32631", **options)


def test_scenes_of_a_day_fill_each_other_in_the_order_of_their_names(tmp_path):
    files = {
        "b": (filled(2), (2020, 100, 9)),
        "a": (filled(1, slice(0, 8)), DAY),
        "c": (filled(3), (2020, 101, 9)),
    }
    series = read(shots_of(tmp_path, files))
    assert series.dates == (DAY, (2020, 101, 9))
    assert series.invalid is None
    np.testing.assert_array_equal(series.values[0, 0, 0], [2] * 8 + [1] * 24)
    assert (series.values[1] == 3).all()
    reverse = dict(reversed(files.items()))
    np.testing.assert_array_equal(read(shots_of(tmp_path / "r", reverse)).values, series.values)


def test_images_that_cover_too_little_are_left_out(tmp_path):
    files = {"a": (filled(1, slice(0, 20)), DAY), "b": (filled(2, slice(0, 10)), (2020, 200, 0))}
    series = read(shots_of(tmp_path, files))
    assert series.dates == ((2020, 200, 0),)
    assert series.invalid[0, 0, :, :10].all()
    assert not series.invalid[0, 0, :, 10:].any()
    assert series.notes == ("s2 has dates with less than 50% valid pixels: these dates are left out",)
    assert read(shots_of(tmp_path, files), min_valid=0.9) is None
    assert len(read(shots_of(tmp_path, files), min_valid=0.0).dates) == 2


def test_all_images_of_a_raster_that_is_no_series_are_one(tmp_path):
    files = {"a": (filled(1, slice(0, 20)), DAY), "b": (filled(2), (2020, 200, 0))}
    series = read(shots_of(tmp_path, files), mosaic="all")
    assert series.values.shape == (1, 1, SIZE, SIZE)
    assert series.dates == (DAY,)


def test_copied_pixels_come_before_resampled_ones(tmp_path):
    exact = write_scene(tmp_path / "z.tif", filled(5), WEST, NORTH)
    shifted = write_scene(tmp_path / "a.tif", filled(6, side=64), WEST - 103, NORTH + 103)
    shots = located_shots([scene_ref(exact, DAY), scene_ref(shifted, DAY, tile="a")], tmp_path, "EPSG:32631")
    assert (read(shots).values == 5).all()


def test_bands_and_masks_of_their_own_files_belong_together(tmp_path):
    refs, clouds = [], []
    for name, value in (("a", 10), ("b", 20)):
        for band in (0, 1):
            hole = slice(0, 8) if (name, band) == ("a", 1) else None
            path = write_scene(
                tmp_path / f"{name}{band}.tif", filled(value + band, hole), WEST, NORTH, nodata=0
            )
            refs.append(scene_ref(path, DAY, (band,), tile=name))
        mask = np.full((1, 16, 16), value, "uint8")
        clouds.append(
            scene_ref(write_scene(tmp_path / f"{name}m.tif", mask, WEST, NORTH, 20.0), DAY, tile=name)
        )
    shots = located_shots(refs, tmp_path, "EPSG:32631", 2, {"cloud": clouds})
    series = read(shots, 2, masks=("cloud",))
    expected = [[20] * 8 + [10] * 24, [21] * 8 + [11] * 24]
    np.testing.assert_array_equal(series.values[0, :, 5], expected)
    np.testing.assert_array_equal(series.masks["cloud"].values[0, 0, 5], [20] * 8 + [10] * 24)
    with pytest.raises(
        DatasetError, match=r"1 images of s2 lack some of their bands, the first: a1.tif \(band 1 of 2"
    ):
        located_shots(refs[1:], tmp_path, "EPSG:32631", 2)
    with pytest.raises(
        DatasetError, match=r"1 images of s2 lack the mask cloud, the first: b0.tif; add the files"
    ):
        located_shots(refs, tmp_path, "EPSG:32631", 2, {"cloud": clouds[:1]})


@pytest.mark.parametrize("apart", [False, True], ids=["bands together", "bands apart"])
def test_files_of_other_places_are_other_images_even_where_no_name_differs(tmp_path, apart):
    """As those of ``S2_{date}_*.tif``: the left and the right half of the cell, and a mask of each."""
    refs, clouds = [], []
    for name, value, west in (("a", 10, WEST), ("b", 20, WEST + 160)):
        values = np.stack([np.full((SIZE, SIZE // 2), v, "uint16") for v in (value, value + 1, value + 2)])
        for bands in ((0,), (1,)) if apart else ((0, 1),):
            path = write_scene(tmp_path / f"{name}{bands}.tif", values[list(bands)], west, NORTH, nodata=0)
            refs.append(scene_ref(path, DAY, bands))
        mask = values[2:].astype("uint8")
        clouds.append(scene_ref(write_scene(tmp_path / f"{name}m.tif", mask, west, NORTH), DAY))
    shots = located_shots(refs, tmp_path, "EPSG:32631", 2, {"cloud": clouds})
    series = read(shots, 2, masks=("cloud",))
    assert series.invalid is None
    np.testing.assert_array_equal(series.values[0, :, 0], [[10] * 16 + [20] * 16, [11] * 16 + [21] * 16])
    np.testing.assert_array_equal(series.masks["cloud"].values[0, 0, 0], [12] * 16 + [22] * 16)


PLACE = Placement("EPSG:32631", (10, 0, 500_000, 0, -10, 5_000_000), 64, 64)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32"])
@pytest.mark.parametrize("method", RESAMPLINGS)
def test_resampling_keeps_a_constant_and_spreads_no_invalid_values(method, dtype):
    from maestro_scale.datasets.scenes.grid import Box

    values = np.full((2, 64, 64), 100, dtype)
    invalid = np.zeros(values.shape, bool)
    invalid[0, :, 30:] = True
    values[0, :, 30:] = 7
    box = Box(500_103, 4_999_703, 500_423, 5_000_023 - 0)
    found = resample(Pixels(values, invalid), PLACE, (0, 0, 64, 64), "EPSG:32631", box, 32, method)
    assert found.values.dtype == dtype
    assert (found.values[~found.invalid] == 100).all()
    assert found.invalid[0, :, 21:].all()
    assert not found.invalid[1, 3:].any()
    assert found.invalid[:, 0].all()  # north of the image


def test_resampling_between_zones_moves_pixels_to_where_they_belong():
    from pyproj import Transformer

    from maestro_scale.datasets.scenes.grid import Box

    rows, cols = np.mgrid[:64, :64].astype("float32")
    ramp = np.stack([500_005 + 10 * cols, 4_999_995 - 10 * rows]).astype("float32")
    to_other = Transformer.from_crs(32631, 32632, always_xy=True)
    x, y = to_other.transform(500_320, 4_999_680)
    box = Box(x - 80, y - 80, x + 80, y + 80)
    found = resample(Pixels(ramp, None), PLACE, (0, 0, 64, 64), "EPSG:32632", box, 16, "bilinear")
    assert found.invalid is None
    back = Transformer.from_crs(32632, 32631, always_xy=True)
    wanted = back.transform(box.west + 5 + 10 * cols[:16, :16], box.north - 5 - 10 * rows[:16, :16])
    np.testing.assert_allclose(found.values, wanted, atol=0.02)


@pytest.mark.parametrize("method", ["bilinear", "cubic"])
def test_pixels_of_a_tile_do_not_depend_on_how_much_of_it_an_image_covers(method):
    from maestro_scale.datasets.scenes.grid import Box

    values = np.random.default_rng(0).normal(0, 100, (1, 320, 320)).astype("float32")
    box = Box(500_000, 4_999_680, 500_320, 5_000_000)
    found = []
    for width in (320, 90):  # the whole tile, and its western 90 m
        place = Placement("EPSG:32631", (1, 0, 500_000, 0, -1, 5_000_000), width, 320)
        pixels = Pixels(values[:, :, :width], None)
        found.append(resample(pixels, place, (0, 0, 320, width), "EPSG:32631", box, 32, method).values)
    np.testing.assert_array_equal(found[0][0, :, :6], found[1][0, :, :6])


def test_a_sharp_edge_of_radar_does_not_become_negative():
    from maestro_scale.datasets.scenes.grid import Box

    values = np.full((1, 64, 64), 1e-4, "float32")
    values[:, 30:34, 30:34] = 5
    box = Box(500_103, 4_999_503, 500_423, 4_999_823)
    found = resample(Pixels(values, None), PLACE, (0, 0, 64, 64), "EPSG:32631", box, 32, "cubic")
    assert found.invalid is None
    assert (found.values.min(), found.values.max() <= 5) == (np.float32(1e-4), True)


def test_a_rotated_image_is_not_blurred():
    from maestro_scale.datasets.scenes.grid import Box

    rows, cols = np.mgrid[:96, :96]
    values = (100 * (cols % 2))[None].astype("float32")  # stripes of a pixel, which a wider kernel would mix
    cos, sin = 0.8, 0.6
    place = Placement("EPSG:32631", (10 * cos, 10 * sin, 500_000, 10 * sin, -10 * cos, 5_000_000), 96, 96)
    west, north = 500_000 + 48 * 14, 5_000_000 - 48 * 2
    box = Box(west, north - 160, west + 160, north)
    found = resample(Pixels(values, None), place, (0, 0, 96, 96), "EPSG:32631", box, 16, "bilinear").values
    east, south = 48 * 14 + 5 + 10 * cols[:16, :16], 48 * 2 + 5 + 10 * rows[:16, :16]
    at = (cos * east - sin * south) / 10 - 0.5  # column of the image, from the centre of its first pixel
    share = at % 1
    wanted = 100 * np.where(np.floor(at) % 2 == 0, share, 1 - share)
    np.testing.assert_allclose(found[0], wanted, atol=0.01)

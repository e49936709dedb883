"""Crops: every sensor covers the same ground."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor
from maestro_scale.stream.crops import Crop, CropGrid
from maestro_scale.stream.orientation import UPRIGHT, Orientation


def spec_of(tile_m: float, **resolution_m: float) -> DatasetSpec:
    modalities = tuple(
        Modality(name, ("x",), res, round(tile_m / res), "float32") for name, res in resolution_m.items()
    )
    sensors = tuple(Sensor(m.name, m.name, 4, 2, 1, (0,), (1,), Scale(), m.name, m.name) for m in modalities)
    return DatasetSpec("toy", "Toy", tile_m, tile_m, 12, modalities, (), sensors)


def ground(modality: Modality) -> np.ndarray:
    """(2, size, size): the place in metres of every pixel's upper left corner."""
    return np.stack(np.mgrid[: modality.size, : modality.size]) * modality.resolution_m


SPECS = [
    (spec_of(1280, spot=1.0, s2=10.0), 160.0),
    (spec_of(640, aerial=1.25, s2=10.0), 120.0),
    (spec_of(102.4, aerial=0.2, s2=10.24), 51.2),
]


@pytest.mark.parametrize(("spec", "crop_m"), SPECS)
def test_all_sensors_of_a_crop_cover_the_same_ground_within_half_a_pixel(spec: DatasetSpec, crop_m: float):
    grid = CropGrid(replace(spec, crop_m=crop_m))
    last = grid.num_offsets - 1
    for row, column in ((0, 0), (1, 2), (last, 0), (last, last)):
        for modality in spec.modalities:
            cut = grid.cut(ground(modality), grid.at(row, column), modality.resolution_m)
            corner = np.array([row, column]) * grid.step_m
            np.testing.assert_allclose(cut[:, 0, 0], corner, atol=modality.resolution_m / 2)
            end = cut[:, -1, -1] + modality.resolution_m
            np.testing.assert_allclose(end, corner + crop_m, atol=modality.resolution_m / 2)
    assert last * grid.step_m == pytest.approx(spec.tile_m - crop_m)


@pytest.mark.parametrize(("spec", "crop_m"), SPECS)
def test_the_crops_of_a_tile_cover_it(spec: DatasetSpec, crop_m: float):
    grid = CropGrid(replace(spec, crop_m=crop_m))
    modality = spec.modalities[0]
    seen = np.zeros((modality.size, modality.size), int)
    for i in range(grid.num_crops):
        grid.cut(seen, grid.tiling(i), modality.resolution_m)[...] += 1
    assert seen.min() == 1
    assert grid.num_crops == np.ceil(spec.tile_m / crop_m) ** 2
    if spec.tile_m % crop_m == 0:
        assert seen.max() == 1


def test_a_crop_as_large_as_the_tile_is_the_whole_raster_even_if_the_sensor_rounds():
    spec = spec_of(100.0, odd=0.3, s2=10.0)
    grid = CropGrid(spec)
    pixels = np.zeros((1, 333, 333))
    assert grid.num_offsets == grid.num_crops == 1
    assert grid.cut(pixels, grid.at(0, 0), 0.3) is pixels


@pytest.mark.parametrize("crop_m", [0.0, -10.0, float("nan"), float("inf"), 5.0, 25.0, 1290.0])
def test_impossible_crops_are_refused(crop_m: float):
    with pytest.raises(ValueError, match=rf"toy\.crop_m: (is )?{crop_m:g}"):
        CropGrid(replace(SPECS[0][0], crop_m=crop_m))


def test_only_the_sensors_in_use_limit_the_crop():
    spec = SPECS[0][0]
    assert CropGrid(replace(spec, sensors=spec.sensors[:1], crop_m=25.0)).step_m == 1.0


def test_there_are_eight_orientations():
    square = np.arange(9).reshape(1, 3, 3)
    turned = [Orientation(*bits).apply(square) for bits in itertools.product((False, True), repeat=3)]
    assert len({t.tobytes() for t in turned}) == 8
    assert turned[0].tolist() == square.tolist()


def test_offsets_and_crops_of_a_tile_counted_by_hand():
    # 1,280 m in steps of 10 m: a crop of 160 m begins at 0, 10, …, 1120 m. 8 x 8 of them cover the tile.
    spec, crop_m = SPECS[0]
    grid = CropGrid(replace(spec, crop_m=crop_m))
    assert (grid.num_offsets, grid.num_per_side, grid.num_crops) == (113, 8, 64)
    # 640 m: 120 m five times is 600 m, the sixth is moved inwards to 520 m.
    spec, crop_m = SPECS[1]
    grid = CropGrid(replace(spec, crop_m=crop_m))
    assert (grid.num_offsets, grid.num_per_side) == (53, 6)
    assert [grid.tiling(i).column_m for i in range(6)] == [0.0, 120.0, 240.0, 360.0, 480.0, 520.0]
    assert (grid.tiling(35).row_m, grid.tiling(6).row_m, grid.tiling(6).column_m) == (520.0, 120.0, 0.0)
    with pytest.raises(ValueError, match="crop 36 of a tile with 36 crops"):
        grid.tiling(36)


def test_an_orientation_flips_first_and_then_transposes():
    square = np.array([[1, 2], [3, 4]])
    assert Orientation(flip_rows=True).apply(square).tolist() == [[3, 4], [1, 2]]
    assert Orientation(flip_columns=True).apply(square).tolist() == [[2, 1], [4, 3]]
    assert Orientation(transpose=True).apply(square).tolist() == [[1, 3], [2, 4]]
    assert Orientation(flip_rows=True, transpose=True).apply(square).tolist() == [[3, 1], [4, 2]]


def test_the_pixels_of_a_crop_begin_at_the_nearest_one():
    # Steps of 10.24 m on pixels of 0.2 m: 1, 2 and 3 of them are 51.2, 102.4 and 153.6 pixels. A crop has 256 of 512.
    spec, crop_m = SPECS[2]
    grid = CropGrid(replace(spec, crop_m=crop_m))
    windows = [grid.window(grid.at(row, 0), 0.2, 512) for row in (1, 2, 3, 5)]
    assert windows == [
        (slice(51, 307), slice(0, 256)),
        (slice(102, 358), slice(0, 256)),
        (slice(154, 410), slice(0, 256)),
        (slice(256, 512), slice(0, 256)),
    ]


def test_the_sides_of_coarse_rasters_are_rounded_and_at_least_a_pixel():
    # A crop of 160 m: 160 / 61 = 2.6 pixels, 160 / 300 = 0.5, 160 / 1280 = 0.1.
    grid = CropGrid(replace(SPECS[0][0], crop_m=160.0))
    assert [grid.side(61.0, 21), grid.side(300.0, 4), grid.side(1280.0, 1)] == [3, 1, 1]
    # It begins at 1,120 m, pixel 3.7 of 4: its one pixel is the last.
    assert grid.window(grid.at(112, 0), 300.0, 4) == (slice(3, 4), slice(0, 1))
    assert grid.window(grid.at(0, 112), 300.0, 4) == (slice(0, 1), slice(3, 4))


def test_a_series_is_cut_on_its_last_two_axes():
    grid = CropGrid(replace(SPECS[0][0], crop_m=160.0))
    series = np.arange(3 * 5 * 128 * 128).reshape(3, 5, 128, 128)
    np.testing.assert_array_equal(grid.cut(series, grid.at(112, 7), 10.0), series[:, :, 112:128, 7:23])


def test_the_default_crop_is_the_upper_left_one_and_upright():
    crop = Crop()
    assert (crop.row_m, crop.column_m) == (0.0, 0.0)
    assert crop.orientation is UPRIGHT
    assert (UPRIGHT.flip_rows, UPRIGHT.flip_columns, UPRIGHT.transpose) == (False, False, False)
    with pytest.raises(FrozenInstanceError):  # all crops share it
        UPRIGHT.flip_rows = True
    with pytest.raises(ValueError, match="crop -1 of a tile with 64 crops"):
        CropGrid(replace(SPECS[0][0], crop_m=160.0)).tiling(-1)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 512, 512), "uint8"),
        ((2, 24, 24), "uint8"),  # windows of rows of 12: words of four pixels
        ((1, 256, 256), "float32"),
        ((3, 5, 5), "int16"),
        ((2, 8, 8), "bool"),
    ],
)
def test_pixels_are_written_as_they_are_applied(shape: tuple[int, ...], dtype: str):
    tile = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    window = tile[..., : shape[-1] // 2, 1 : 1 + shape[-1] // 2]
    for pixels in (tile, window):
        for flags in itertools.product((False, True), repeat=3):
            expected = Orientation(*flags).apply(pixels)
            out = np.zeros(expected.shape, dtype)
            Orientation(*flags).write(pixels, out)
            assert np.array_equal(out, expected)

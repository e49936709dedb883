"""The statistics of tiles: values worked out by hand, the recorded ranges of real tiles, and the synthetic scenes."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maestro_scale.datasets import open_raw, synth
from maestro_scale.datasets.bands import group_of, wavelength_nm
from maestro_scale.datasets.patterns import (
    autocorrelation,
    cut_windows,
    movement,
    normalised_targets,
    pattern_kept,
    relative_deviation,
    residual_correlation,
)
from maestro_scale.datasets.real_ranges import REAL_RANGES
from maestro_scale.datasets.spec import DatasetSpec, Modality
from maestro_scale.datasets.statistics import UNITS, DatasetStatistics, TileStatistics, tile_statistics

REAL = Path(
    os.environ.get("MAESTRO_TREESATAI_DIR", Path(__file__).parents[2] / "../shared/data/treesatai_ts")
)
NAN = np.full((3, 3), np.nan)
RAMP = np.arange(9.0).reshape(3, 3)  # by rows
BOARD = np.indices((3, 3)).sum(axis=0) % 2 * 1.0


def windows(*dates) -> np.ndarray:
    """(T, C, 1, S, S) from one list of bands (S, S) per date."""
    return np.array(dates, float)[:, :, None]


def test_autocorrelation_of_a_ramp_a_board_and_three_pixels():
    # A ramp: neighbours differ by a constant. A board: they are opposite. [[0, 1], [1, 1]] has the pairs (0, 1), (1, 1)
    # in both directions: one side is constant or the pairs do not vary together, so the correlation is not defined.
    found = autocorrelation(windows([RAMP, BOARD, np.ones((3, 3))], [RAMP, NAN, NAN]))
    assert found[0, :2] == pytest.approx([1, -1])
    assert np.isnan(found[0, 2])
    assert found[1, 0] == pytest.approx(1)
    # Columns 0, 1, 0: right neighbours are opposite (−1), neighbours below equal (1).
    assert autocorrelation(windows([np.tile([0.0, 1.0, 0.0], (3, 1))]))[0, 0] == pytest.approx(0)


def test_residuals_lose_the_mean_of_the_patch_and_of_the_date():
    # Brightness common to both bands and different between dates is removed; ramp and board have no correlation:
    # the sum of (−4 … 4) over the odd pixels (−3, −1, 1, 3) is 0.
    found = residual_correlation(windows([RAMP + 100, BOARD + 100, -RAMP], [RAMP, BOARD, -RAMP + 7]))
    np.testing.assert_allclose(found, [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-12)
    assert np.isnan(residual_correlation(windows([NAN, NAN]))).all()


def test_relative_deviation():
    # 1 … 9: mean 5, variance (81 − 1) / 12.
    found = relative_deviation(windows([RAMP + 1, 10 * (RAMP + 1)]))
    np.testing.assert_allclose(found[0, :, 0], np.sqrt(80 / 12) / 5)


def test_targets_and_their_movement():
    """One token of 2 × 2 pixels and two bands, of 0 and 2: mean 1, unbiased variance 8 / 7."""
    zero, two = np.zeros((2, 2)), np.full((2, 2), 2.0)
    still = normalised_targets(windows([zero, two]))
    np.testing.assert_allclose(still[0, 0, 0], -1 / np.sqrt(8 / 7 + 1e-6))
    np.testing.assert_allclose(still[0, 1, 0], 1 / np.sqrt(8 / 7 + 1e-6))
    # Brightness of the date and contrast are normalised away.
    same = normalised_targets(windows(*[[zero + k, (k + 1) * two + k] for k in range(4)]))
    assert movement(same) == pytest.approx(0, abs=1e-5)
    # The bands are exchanged on two of four dates: ±1/√(8/7), whose standard deviation is the same number.
    turned = normalised_targets(windows([zero, two], [two, zero], [zero, two], [two, zero]))
    assert movement(turned) == pytest.approx(1 / np.sqrt(8 / 7), rel=1e-5)
    # Each band as a group of its own keeps nothing of its level.
    alone = normalised_targets(windows([zero], [two], [zero], [two]))
    assert movement(alone) == 0
    assert np.isnan(movement(turned[:3]))  # three dates are too few


def test_a_pattern_is_kept_between_dates_that_were_measured():
    dates = [RAMP], [NAN], [5 * RAMP + 3], [-RAMP]
    assert pattern_kept(windows(*dates)) == pytest.approx(
        [0]
    )  # 1, then −1; the date without values is passed over
    assert np.isnan(pattern_kept(windows([RAMP], [NAN]))).all()


def test_windows_are_cut_beside_each_other_and_bounded():
    raster = np.arange(14 * 13.0).reshape(1, 1, 14, 13)
    cut = cut_windows(raster)
    assert cut.shape == (1, 1, 4, 6, 6)
    np.testing.assert_array_equal(cut[0, 0, 3], raster[0, 0, 6:12, 6:12])
    assert cut_windows(np.zeros((1, 1, 4, 9))).shape == (1, 1, 2, 4, 4)
    assert cut_windows(np.zeros((1, 1, 128, 128), bool)).shape == (1, 1, 64, 6, 6)


@pytest.mark.parametrize(
    ("band", "nm", "group"),
    [
        ("B02", 490, "visible"),
        ("b5", 705, "visible"),
        ("B8A", 865, "nir"),
        ("NIR", 835, "nir"),
        ("swir2", 2190, "swir"),
        ("L10", 10895, None),
        ("VV", None, None),
    ],
)
def test_bands_by_name(band, nm, group):
    assert wavelength_nm(band) == nm
    assert group_of(band) == group


SPEC = DatasetSpec(
    "mine",
    "Mine",
    60.0,
    60.0,
    6,
    (
        Modality("s2", ("B4", "B8", "quality"), 10.0, 6, "int16", series=True, mask_bands=("cloud",)),
        Modality("s1", ("VV", "VH"), 10.0, 6, "float32", series=True),
        Modality("dem", ("DSM",), 1.0, 60, "float32"),
    ),
    (),
    (),
)
DAYS = np.array([[2020, d, 0] for d in (10, 100, 190, 280, 300)], np.int16)


def tile(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    s2 = rng.integers(900, 1100, (5, 3, 6, 6)).astype(np.int16)
    s2[:, 1] += np.array([0, 1000, 2000, 1000, 0], np.int16)[:, None, None]
    s1 = rng.gamma(5, 0.02, (5, 2, 6, 6)).astype(np.float32)
    arrays = {"s2": s2, "s1": s1, "dem": np.zeros((1, 1, 60, 60), np.float32)}
    dates = {"s2": DAYS, "s1": DAYS, "dem": DAYS[:1]}
    return arrays, dates, {"s2": np.zeros((5, 1, 6, 6), np.uint8)}


def test_a_tile_of_a_dataset_with_other_bands_says_what_does_not_apply():
    arrays, dates, masks = tile()
    found = tile_statistics(SPEC, arrays, dates, masks)
    assert found.reasons == {
        "residual_swir_nir": "no bands of short-wave infrared",
        "residual_visible_swir": "no bands of short-wave infrared",
        "residual_within_groups": "too few clear dates, or constant values",
        "deviation_swir": "no bands of short-wave infrared",
        "image_autocorrelation": "no image of one date with 1.5 m per pixel or less",
        "image_deviation": "no image of one date with 1.5 m per pixel or less",
    }
    assert abs(found.values["optical_autocorrelation"]) < 0.15  # white noise
    # NDVI of 1000 and 1000 … 3000: 0, 1/3, 1/2, 1/3, 0 within the noise of the mean of 36 pixels.
    assert found.values["lowest_ndvi"] == pytest.approx(0, abs=0.03)
    assert found.values["season_ndvi"] == pytest.approx(0.43, abs=0.03)
    without = tile_statistics(SPEC.select(["dem"]), arrays, dates, masks)
    assert without.values == {}
    assert without.reasons["radar_kept"] == "no series with VV, VH, HH or HV"
    assert without.reasons["movement_patch"].startswith("no series with bands of known visible")


@pytest.mark.parametrize("size", [1, 4])
def test_rasters_smaller_than_a_window_have_statistics_of_the_tile_alone(size):
    arrays, dates, masks = tile()
    arrays = {name: array[..., :size, :size] for name, array in arrays.items()}
    masks = {name: array[..., :size, :size] for name, array in masks.items()}
    spec = replace(SPEC, modalities=tuple(replace(m, size=size) for m in SPEC.modalities))
    found = tile_statistics(spec, arrays, dates, masks)
    assert list(found.values) == ["season_ndvi", "lowest_ndvi", "radar_movement"]
    assert found.reasons["radar_kept"].startswith("s1 has fewer than 6 pixels per side")
    assert found.reasons["movement_patch"].startswith("s2 has fewer than 6 pixels per side")


@pytest.mark.parametrize("how", ["mask", "nodata", "bright"])
def test_clouds_and_nodata_are_left_out(how):
    """A date that would change every statistic changes none where it is marked, or bright without a mask."""
    arrays, dates, masks = tile()
    dates["s2"] = dates["s2"][:4]
    arrays["s2"] = arrays["s2"][:4]
    masks["s2"] = masks["s2"][:4]
    want = tile_statistics(SPEC, arrays, dates, masks).values
    cloud = np.full((1, 3, 6, 6), 6000, np.int16)
    cloud[..., 3:] = 9000
    if how == "nodata":
        cloud[0, 0, 2, 3] = 0
    arrays["s2"] = np.concatenate([arrays["s2"], cloud])
    dates["s2"] = DAYS
    masks["s2"] = np.concatenate([masks["s2"], np.zeros((1, 1, 6, 6), np.uint8)])
    if how == "nodata":
        assert tile_statistics(SPEC, arrays, dates, masks).values == want
    if how == "mask":
        masks["s2"][4, 0, 0, 0] = 1
        assert tile_statistics(SPEC, arrays, dates, masks).values == want
    if how == "bright":
        assert tile_statistics(SPEC, arrays, dates, masks).values != want
        assert tile_statistics(SPEC, arrays, dates, {}).values == want


def test_radar_in_decibels_and_linear_power_agree_and_repeated_dates_count_once():
    arrays, dates, masks = tile()
    linear = tile_statistics(SPEC, arrays, dates, masks).values
    decibels = dict(arrays, s1=10 * np.log10(arrays["s1"]))
    twice = dict(arrays, s1=np.repeat(arrays["s1"], 2, axis=0)), dict(dates, s1=np.repeat(DAYS, 2, axis=0))
    for name in ("radar_autocorrelation", "radar_kept", "radar_deviation", "radar_movement"):
        assert tile_statistics(SPEC, decibels, dates, masks).values[name] == pytest.approx(
            linear[name], abs=1e-5
        )
        assert tile_statistics(SPEC, *twice, masks).values[name] == pytest.approx(linear[name], abs=1e-5)
    # The standard deviation of five looks in dB: 10 / ln 10 · √ψ'(5) = 4.343 · √0.2213 = 2.043.
    assert linear["radar_deviation"] == pytest.approx(2.04, abs=0.2)


def test_statistics_of_tiles_are_averaged_and_reasons_kept_where_no_tile_has_a_value():
    statistics = DatasetStatistics()
    for value in (1.0, 2.0, 6.0):
        statistics.add(TileStatistics({"radar_kept": value}, {"season_ndvi": "clouds"}))
    statistics.add(TileStatistics({"season_ndvi": 0.5}, {"radar_kept": "no", "image_deviation": "none"}))
    measured = statistics.measured()
    assert list(measured) == ["season_ndvi", "radar_kept"]  # the order of tables
    assert (measured["radar_kept"].mean, measured["radar_kept"].num_tiles) == (3, 3)
    assert measured["radar_kept"].error == pytest.approx(np.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2
    assert measured["season_ndvi"].error == 0
    assert (measured["radar_kept"].low, measured["radar_kept"].high) == pytest.approx((1.2, 5.2))
    assert statistics.reasons() == {"image_deviation": "none"}
    assert statistics.num_tiles == 4


def test_every_statistic_has_a_recorded_range():
    assert list(REAL_RANGES) == list(UNITS)
    assert all(r.low < r.high for r in REAL_RANGES.values())
    kept = REAL_RANGES["radar_kept"]
    assert [kept.side(v) for v in (0.1, 0.146, 0.15, 0.57, 0.574, 0.6)] == [
        *("below", "inside", "inside", "inside", "inside", "above")
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real tile at {REAL}")
def test_the_real_tile_is_within_the_recorded_ranges():
    reader = open_raw("treesatai_ts", REAL, "train")
    (key,) = reader.keys()
    real = reader.read(key)
    found = tile_statistics(reader.spec, real.arrays, real.dates, real.masks)
    assert found.reasons == {}
    assert {name: REAL_RANGES[name].side(value) for name, value in found.values.items()} == dict.fromkeys(
        UNITS, "inside"
    )
    # Values that were recorded of this tile by another implementation: science.md.
    assert found.values["deviation_visible"] == pytest.approx(12.7, abs=0.15)
    assert found.values["movement_patch"] == pytest.approx(0.15, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tiles", "splits"),
    [
        ("treesatai_ts", 100, ("train", "val", "test")),
        ("pastis_hd", 5, tuple(f"fold_{i}" for i in range(1, 6))),
    ],
)
def test_synthetic_scenes_are_within_the_ranges_of_real_tiles(tmp_path, name, tiles, splits):
    """The mean over tiles, up to two standard errors of it. Values that depend on what grows are those of forest."""
    synth(name, tmp_path / name, tiles, 0)
    statistics = DatasetStatistics()
    modalities = None if name == "treesatai_ts" else ["s2", "s1_asc", "s1_des"]
    for split in splits:
        reader = open_raw(name, tmp_path / name, split, modalities)
        for one in map(reader.read, reader.keys()):
            statistics.add(tile_statistics(reader.spec, one.arrays, one.dates, one.masks))
    measured = statistics.measured()
    assert statistics.num_tiles == tiles
    comparable = [n for n in UNITS if name == "treesatai_ts" or not REAL_RANGES[n].of_forest]
    outside = {}
    for statistic in comparable:
        found, real = measured[statistic], REAL_RANGES[statistic]
        nearest = np.clip(found.mean, real.low, real.high)
        if not real.contains(found.mean) and abs(found.mean - nearest) > 2 * found.error:
            outside[statistic] = (found.mean, real.low, real.high)
    assert outside == {}


def test_a_large_image_is_averaged_window_by_window():
    image = Modality("aerial", ("R", "G", "B"), 0.5, 6000, "uint8", series=False)
    spec = DatasetSpec("a", "a", 3000.0, 3000.0, 1, (image,), (), (), "")
    array = np.zeros((1, 3, 6000, 6000), np.uint8)
    array[:, :, ::2] = 2
    tracemalloc.start()
    tile_statistics(spec, {"aerial": array}, {"aerial": np.array([[2021, 100, 12]])}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 4  # as float64 it has eight times as many

"""The reader of the fuel moisture series: dates, labels and splits by hand, and the real files where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from maestro_scale import datasets
from maestro_scale.datasets.fuel_moisture.reader import CHANNELS, FULL_SPEC, SPEC
from maestro_scale.datasets.spec import DatasetError, GeoOrigin
from maestro_scale.datasets.spec_check import target_group_problems
from maestro_scale.shards.format.values import checked_tile

REAL = Path(
    os.environ.get(
        "MAESTRO_FUEL_MOISTURE_DIR",
        Path(__file__).parents[2] / "../shared/data/presto/fuel_moisture",
    )
)
NUM = 12


@pytest.fixture
def files(tmp_path) -> Path:
    """Twelve pixels, two per place; the last four are test; channel c of month m of pixel i is 100·i + 10·m + c."""
    i, m, c = np.ogrid[:NUM, :3, : len(CHANNELS)]
    months = np.array([[10, 11, 0]] + [[3, 3, 4]] * (NUM - 1))
    cover = np.array([[2, 1, 1], [0, 1, 2], [4, 4, 5]] + [[7, 7, 7]] * (NUM - 3), np.uint8)
    latlon = np.repeat(np.arange(6.0), 2)[:, None] + np.array([40.0, -110.0])
    arrays = {
        "s1_s2_era5_srtm": 100.0 * i + 10 * m + c,
        "month": months,
        "latlon": latlon,
        "dynamic_world": cover,
        "target": 10.0 * np.arange(NUM),
        "is_test": (np.arange(NUM) >= 8).astype(int),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def test_a_pixel_is_a_tile_with_dates_labels_and_place(files):
    reader = datasets.open_raw("fuel_moisture", files, "train")
    tile = checked_tile(reader.read("pixel-0000"), SPEC)
    # November, December, January: the middle of the months, January in the next year.
    assert tile.dates["s2"].tolist() == [[2018, 319, 12], [2018, 349, 12], [2019, 15, 12]]
    assert tile.origin == GeoOrigin("EPSG:4326", -110.0, 40.0)
    assert tile.arrays["s1"][:, :, 0, 0].tolist() == [[0, 1], [10, 11], [20, 21]]
    # B2 is channel 2; B9, B11 and B12 follow B8A.
    assert tile.arrays["s2"][1, :, 0, 0].tolist() == list(range(12, 23))
    assert SPEC.modality("s2").bands[8:] == ("B9", "B11", "B12")
    # ERA5 is channels 13 and 14: K to °C, m to mm; elevation and slope are 15 and 16.
    np.testing.assert_allclose(tile.arrays["weather"][0, :, 0, 0], [13 - 273.15, 14_000], rtol=1e-5)
    np.testing.assert_allclose(tile.arrays["terrain"][0, :, 0, 0], [0.15, 16])
    assert tile.arrays["era5"][0, :, 0, 0].tolist() == [13, 14]
    labels = [reader.read(f"pixel-000{i}").targets for i in range(3)]
    # The most frequent class; of three classes the latest.
    assert [int(t["land_cover"][0]) for t in labels] == [1, 2, 4]
    assert [float(t["moisture"][0]) for t in labels] == [0, 10, 20]
    # Terciles of the eight training labels 0, 10 … 70: limits 23.3 and 46.7.
    terciles = [int(reader.read(f"pixel-000{i}").targets["moisture_tercile"][0]) for i in (0, 2, 3, 4, 5)]
    assert terciles == [0, 0, 1, 1, 2]


def test_no_place_is_in_two_splits(tmp_path, files):
    keys = {s: datasets.open_raw("fuel_moisture", files, s).keys() for s in ("train", "val", "test")}
    assert keys["test"] == [f"pixel-{i:04d}" for i in range(8, 12)]
    assert keys["train"] == [f"pixel-{i:04d}" for i in range(8)]
    assert keys["val"] == []  # every fifth place; there are four
    with pytest.raises(DatasetError, match="no split 'dev'; there are: train, val, test"):
        datasets.open_raw("fuel_moisture", files, "dev")


def test_bad_files_are_named(files):
    np.save(files / "month.npy", np.full((NUM, 3), 12))
    with pytest.raises(DatasetError, match=r"month\.npy: has numbers outside 0 to 11"):
        datasets.open_raw("fuel_moisture", files, "train")
    np.save(files / "month.npy", np.zeros((NUM, 2)))
    with pytest.raises(
        DatasetError, match=r"month\.npy: is float64 \(12, 2\), expected numbers of shape \(12, 3\)"
    ):
        datasets.open_raw("fuel_moisture", files, "train")
    (files / "month.npy").unlink()
    with pytest.raises(DatasetError, match=r"month\.npy: cannot be read"):
        datasets.open_raw("fuel_moisture", files, "train")
    with pytest.raises(DatasetError, match="has no synthetic data"):
        datasets.synth("fuel_moisture", files, 1, 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target", np.nan, r"target\.npy: has numbers outside -1e\+06 to 1e\+06"),  # terciles would be NaN
        ("target", np.inf, r"target\.npy: has numbers outside"),
        ("latlon", np.nan, r"latlon\.npy: has numbers outside -180 to 180"),
        ("month", np.nan, r"month\.npy: has numbers outside 0 to 11"),
        ("is_test", np.nan, r"is_test\.npy: has numbers outside 0 to 1"),
        ("dynamic_world", 9.0, r"dynamic_world\.npy: has numbers outside 0 to 8"),
        ("s1_s2_era5_srtm", 1e300, r"srtm\.npy: has numbers outside"),
    ],
)
def test_numbers_that_no_measurement_has_are_refused(files, name, value, message):
    array = np.load(files / f"{name}.npy").astype(float)
    array.flat[0] = value
    np.save(files / f"{name}.npy", array)
    with pytest.raises(DatasetError, match=message):
        datasets.open_raw("fuel_moisture", files, "train")


def test_a_folder_without_training_pixels_is_refused(files):
    np.save(files / "is_test.npy", np.ones(NUM))
    with pytest.raises(DatasetError, match="all 12 pixels are in test"):
        datasets.open_raw("fuel_moisture", files, "test")


def test_no_target_group_of_a_sensor_is_one_value():
    for target in ("patch_group", "patch"):
        assert list(target_group_problems(FULL_SPEC.sensors, target)) == []


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real series are not in {REAL}")
def test_the_real_files_have_the_official_split_and_all_labels():
    readers = {s: datasets.open_raw("fuel_moisture", REAL, s) for s in ("train", "val", "test")}
    assert {s: len(r.keys()) for s, r in readers.items()} == {"train": 1248, "val": 330, "test": 735}
    test = readers["test"]
    keys = test.keys()
    terciles = [int(test.read(key).targets["moisture_tercile"][0]) for key in keys]
    assert np.bincount(terciles).tolist() == [245, 264, 226]
    tile = checked_tile(test.read(keys[0]), SPEC)
    assert 0.0 < tile.arrays["s2"].mean() / 10_000 < 1.0

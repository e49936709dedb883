"""Spec and tiles of a user's own dataset, and the errors for invalid input."""

from __future__ import annotations

import datetime

import numpy as np
import pytest

import maestro_scale.shards as public
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.shards import Raster, Target, Writer, describe
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.from_arrays import make_tile

S2 = Raster("s2", ("B4", "B8"), 10, "int16", patch=2, divisor=5000, num_dates=4, mask_bands=("cloud",))
RADAR = Raster("s1", ("VV",), 10, "float32", patch=3, scale="log", group="radar", embed="c-band")
KIND = Target("kind", "multilabel", ("apple", "pear"))
COVER = Target("cover", "segmentation", ("bare", "tree"), resolution_m=10)
SPEC = describe("mine", 60, [S2, RADAR], [KIND, COVER])


def arrays(num_dates: int = 3) -> dict[str, np.ndarray]:
    return {"s2": np.ones((num_dates, 2, 6, 6), np.int16), "s1": np.ones((1, 6, 6), np.float32)}


DAYS = {"s2": ["2020-02-29", "2020-12-31T23:10:00Z", "2021-01-01"], "s1": datetime.date(2020, 3, 1)}
LABELS = {"kind": {"pear": 0.5}, "cover": np.zeros((6, 6), int)}
MASKS = {"s2": np.zeros((3, 1, 6, 6), np.uint8)}


def test_describe():
    assert SPEC.modality("s2").series
    assert not SPEC.modality("s1").series
    s2, s1 = SPEC.sensors
    assert (s2.image_size, s2.num_dates, s2.band_groups, s2.group, s2.embed) == (6, 4, (2,), "s2", "s2")
    assert (s1.num_dates, s1.scale.kind, s1.group, s1.embed) == (1, "log", "radar", "c-band")
    assert (SPEC.pos_grid, SPEC.ref_sensor, SPEC.crop_m) == (6, "s2", 60)
    cropped = describe("mine", 60, [S2], crop_m=20)
    assert (cropped.sensors[0].image_size, cropped.modalities[0].size) == (2, 6)


def test_dates_and_labels_in_all_accepted_forms():
    tile = make_tile(SPEC, "a", arrays(), DAYS, masks=MASKS, targets=LABELS)
    assert tile.dates["s2"].tolist() == [[2020, 60, 0], [2020, 366, 23], [2021, 1, 0]]
    assert tile.dates["s1"].tolist() == [[2020, 61, 0]]
    assert tile.arrays["s1"].shape == (1, 1, 6, 6)
    assert tile.ref_date.tolist() == [2020, 60, 0]
    assert tile.targets["kind"].tolist() == [0.0, 0.5]
    assert tile.targets["cover"].dtype == np.uint8
    times = np.array(["2020-02-29", "2020-12-31T23:10", "2021-01-01"], "datetime64[ns]")
    same = make_tile(
        SPEC, "a", arrays(), {**DAYS, "s2": times}, targets={"kind": [0.0, 0.5]}, ref_date="2019-07-01"
    )
    np.testing.assert_array_equal(same.dates["s2"], tile.dates["s2"])
    np.testing.assert_array_equal(same.targets["kind"], tile.targets["kind"])
    assert same.ref_date.tolist() == [2019, 182, 0]


def test_arrays_are_stored_unchanged(tmp_path):
    with Writer(str(tmp_path), SPEC, "train") as writer:
        for i in range(3):
            writer.add_arrays(f"t{i}", arrays(), DAYS, masks=MASKS, targets=LABELS)
    manifest = Manifest.load(str(tmp_path))
    assert manifest.spec == SPEC
    with Store(str(tmp_path), tmp_path / "cache", 0).shard(manifest.shards[0]) as shard:
        assert sorted(shard.keys) == ["t0", "t1", "t2"]
        assert shard[0].array("s2.dates").tolist()[1] == [2020, 366, 23]


@pytest.mark.parametrize(
    ("raster", "says"),
    [
        (Raster("s2", ("B4",), 10, "int16", patch=4), r"mine\.sensors\[0\]\.patch: 4 does not divide"),
        (Raster("s2", ("B4",), 10, "int16", patch=0), r"mine\.sensors\[0\]\.patch: 0"),
        (
            Raster("s2", ("B4",), 10, "complex64", patch=2),
            r"mine\.modalities\[0\]\.dtype: 'complex64' is not one of",
        ),
        (Raster("s2", ("B4",), 10, "int16", patch=2, band_groups=(2,)), "do not add up to 1 bands"),
        (Raster("s 2", ("B4",), 10, "int16", patch=2), "'s 2' is not a valid name"),
        (Raster("s2", (), 10, "int16", patch=2), "0 bands"),
    ],
)
def test_an_inconsistent_description_is_refused(raster, says):
    with pytest.raises(ManifestError, match=says):
        describe("mine", 60, [raster])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dates": {**DAYS, "s1": "spring"}}, "tile a: s1 has the date 'spring'; give dates"),
        ({"dates": {**DAYS, "s2": [20200301, 1, 2]}}, "tile a: s2 has the date 20200301"),
        ({"dates": {"s2": []}}, "tile a: s2 has no dates"),
        ({"dates": {"s1": "2020-01-01"}}, r"tile a: s2 has no dates; give dates\['s2'\]"),
        (
            {"dates": {**DAYS, "s2": "2020-01-01"}},
            r"tile a: s2\.dates is int16 \(1, 3\), expected int16 \(3, 3\)",
        ),
        ({"arrays": {**arrays(), "s2": np.ones((3, 2, 6, 6))}}, "tile a: s2 is float64"),
        ({"arrays": {"s2": arrays()["s2"]}}, "tile a: lacks the field s1"),
        ({"masks": {}}, r"tile a: lacks the field s2\.mask"),
        (
            {"targets": {**LABELS, "kind": {"fig": 1.0}}},
            "tile a: kind has no class 'fig'; there are: apple, pear",
        ),
        ({"targets": {**LABELS, "cover": np.full((6, 6), -1)}}, "tile a: cover is int64"),
        ({"targets": {**LABELS, "cover": np.full((6, 6), 2)}}, r"tile a: target\.cover contains the value 2"),
        ({"targets": {**LABELS, "kinds": 1}}, r"tile a: has, unlike the spec, the field target\.kinds"),
    ],
)
def test_an_invalid_tile_is_named_and_nothing_is_written(tmp_path, changes, says):
    given = {"arrays": arrays(), "dates": DAYS, "masks": MASKS, "targets": LABELS, **changes}
    with pytest.raises(DatasetError, match=says), Writer(str(tmp_path / "new"), SPEC, "train") as writer:
        writer.add_arrays("a", **given)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_public_names():
    for name in public.__all__:
        assert getattr(public, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'writers'"):
        _ = public.writers

"""Rules for sensors, sizes, crops and specs: what is refused, at which path, and what is accepted."""

from __future__ import annotations

import dataclasses
import math

import pytest

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor, Target
from maestro_scale.datasets.spec_check import (
    crop_problems,
    sensor_problems,
    sharing_problems,
    source_problems,
    spec_problems,
)

AERIAL = Sensor("aerial", "aerial", 12, 4, 1, (0, 1, 2), (1, 2), Scale(), "aerial", "aerial")
S2 = Sensor("s2", "s2", 6, 2, 3, (0, 1), (2,), Scale(), "s2", "s2")
SPEC = DatasetSpec(
    name="toy",
    title="Toy",
    tile_m=60.0,
    crop_m=30.0,
    pos_grid=12,
    modalities=(
        Modality("aerial", ("R", "G", "B"), 2.5, 24, "uint8"),
        Modality("s2", ("B2", "B3"), 10.0, 6, "int16", series=True),
    ),
    targets=(
        Target("cover", "segmentation", ("a", "b", "c"), resolution_m=10.0),
        Target("shares", "multilabel", ("a", "b"), of="cover"),
    ),
    sensors=(AERIAL, S2),
    ref_sensor="s2",
)


def changed(part: str, number: int, **changes) -> DatasetSpec:
    """SPEC with fields of one modality, target or sensor changed."""
    items = list(getattr(SPEC, part))
    items[number] = dataclasses.replace(items[number], **changes)
    return dataclasses.replace(SPEC, **{part: tuple(items)})


def test_a_spec_without_contradictions_has_no_problems():
    assert list(spec_problems(SPEC)) == list(crop_problems(SPEC)) == []


@pytest.mark.parametrize("name", datasets.known())
def test_the_shipped_datasets_have_no_problems(name):
    for spec in (datasets.spec(name), datasets.full_spec(name)):
        assert list(spec_problems(spec)) == list(crop_problems(spec)) == []


@pytest.mark.parametrize(
    ("spec", "path", "reason"),
    [
        (dataclasses.replace(SPEC, name="a b"), ("name",), "'a b' is not a valid name"),
        (changed("sensors", 1, name="ref_date"), ("sensors", 1, "name"), "'ref_date' is not a valid name"),
        (changed("targets", 1, name="cover"), ("targets", 1, "name"), "'cover' is there twice"),
        (dataclasses.replace(SPEC, tile_m=0.0), ("tile_m",), "is 0, must be a positive number of metres"),
        (dataclasses.replace(SPEC, crop_m=-1.0), ("crop_m",), "is -1, must be a positive number"),
        (dataclasses.replace(SPEC, crop_m=math.nan), ("crop_m",), "is nan, must be a positive number"),
        (dataclasses.replace(SPEC, pos_grid=0), ("pos_grid",), "is 0, must be at least 1"),
        (dataclasses.replace(SPEC, ref_sensor="s1"), ("ref_sensor",), "'s1' is not one of the sensors (aerial, s2)"),
        (changed("modalities", 0, dtype="complex64"), ("modalities", 0, "dtype"), "'complex64' is not one of"),
        (changed("modalities", 1, size=0), ("modalities", 1), "has 2 bands of 0 pixels a side"),
        (changed("modalities", 1, resolution_m=math.inf), ("modalities", 1, "resolution_m"), "is inf, must be"),
        (changed("targets", 0, classes=()), ("targets", 0, "classes"), "is empty"),
        (changed("targets", 0, resolution_m=None), ("targets", 0, "resolution_m"), "is missing"),
        (changed("targets", 1, of="shares"), ("targets", 1, "of"), "'shares' is not a segmentation target"),
        (changed("targets", 1, classes=("a", "z")), ("targets", 1, "of"), "cover has no class 'z'"),
        (changed("sensors", 0, source="areal"), ("sensors", 0, "source"), "'areal' (did you mean 'aerial'?)"),
        (changed("sensors", 0, bands=(0, 1, 3)), ("sensors", 0, "bands"), "[0, 1, 3] do not index the 3 bands"),
        (changed("sensors", 0, bands=(-1, 0, 1)), ("sensors", 0, "bands"), "of aerial (0 to 2)"),
        (changed("sensors", 0, num_dates=2), ("sensors", 0, "num_dates"), "aerial is a single image, so 1, not 2"),
        (changed("sensors", 1, num_dates=0), ("sensors", 1, "num_dates"), "is 0, must be at least 1"),
        (changed("sensors", 1, patch=4), ("sensors", 1, "patch"), "4 does not divide image_size 6"),
        (changed("sensors", 1, patch=0), ("sensors", 1, "patch"), "0 does not divide image_size 6"),
        (changed("sensors", 1, image_size=0), ("sensors", 1, "patch"), "2 does not divide image_size 0"),
        (changed("sensors", 0, band_groups=(1,)), ("sensors", 0, "band_groups"), "[1] do not add up to 3 bands"),
        (changed("sensors", 0, token_groups=(4,)), ("sensors", 0, "token_groups"), "[4] do not add up to 3"),
        (changed("sensors", 0, elevation=True), ("sensors", 0, "elevation"), "needs 2 bands"),
    ],
)  # fmt: skip
def test_each_contradiction_is_found_at_its_path(spec, path, reason):
    found = list(spec_problems(spec))
    assert found[0][0] == path
    assert reason in found[0][1]


@pytest.mark.parametrize(
    ("crop_m", "reason"),
    [
        (61.0, "61 m is larger than a tile, 60 m"),
        (25.0, "25 m is not a multiple of the coarsest sensor's pixel, 10 m: use 20 or 30"),
        (4.0, "4 m is not a multiple of the coarsest sensor's pixel, 10 m: use 10"),
        (55.0, "55 m is not a multiple of the coarsest sensor's pixel, 10 m: use 50 or 60"),
        (0.0, "is 0, must be a positive number of metres"),
        (math.nan, "is nan, must be a positive number of metres"),
    ],
)
def test_a_crop_that_cannot_be_cut_is_refused(crop_m, reason):
    assert list(crop_problems(dataclasses.replace(SPEC, crop_m=crop_m))) == [(("crop_m",), reason)]


@pytest.mark.parametrize("crop_m", [10.0, 30.0, 59.9999999, 60.0, 60.0000001])
def test_a_crop_of_whole_pixels_or_of_the_tile_is_accepted(crop_m):
    assert list(crop_problems(dataclasses.replace(SPEC, crop_m=crop_m))) == []


def test_a_whole_tile_need_not_be_a_multiple_of_a_pixel():
    assert list(crop_problems(dataclasses.replace(SPEC, tile_m=64.0, crop_m=64.0))) == []


def test_only_the_sensors_in_use_limit_a_crop():
    assert list(crop_problems(dataclasses.replace(SPEC, sensors=(AERIAL,), crop_m=12.5))) == []


def test_sensors_of_one_embed_need_equal_inputs_and_of_one_name_equal_tokens():
    other = dataclasses.replace(S2, name="landsat", patch=3)
    assert list(sharing_problems([("", (S2, other))])) == [
        (
            ("landsat", "embed"),
            "'s2' is shared with s2, but patch 3 of 2 bands differs from patch 2 of 2 bands: change both alike, or "
            "give it its own embed",
        )
    ]
    split = dataclasses.replace(S2, embed="own", token_groups=(1, 1))
    assert list(sharing_problems([("one", (S2,)), ("two", (split,))])) == [
        (
            ("two", "sensors", "s2", "token_groups"),
            "[1, 1], but one.sensors.s2 has []: sensors of one name share their mask tokens",
        )
    ]
    assert list(sharing_problems([("one", (S2,)), ("two", (S2, AERIAL))])) == []


def test_a_sensor_is_checked_by_itself_and_against_what_is_stored():
    assert list(sensor_problems(S2)) == list(source_problems(S2, SPEC.modalities)) == []
    assert [path for path, _ in source_problems(S2, ())] == [("source",)]

"""Rules for sensors, sizes, crops and specs: what is refused, at which path, and what is accepted."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch

from maestro_scale import datasets
from maestro_scale.datasets import spec_limits
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
        # Numbers that are impossible, or that no dataset has.
        (dataclasses.replace(SPEC, tile_m=math.nan), ("tile_m",), "is nan, must be a positive number of metres"),
        (dataclasses.replace(SPEC, tile_m=math.inf), ("tile_m",), "is inf, must be a positive number of metres"),
        (dataclasses.replace(SPEC, tile_m=2e7), ("tile_m",), "is 2e+07, must be from 0.0001 to 1e+07 metres"),
        (dataclasses.replace(SPEC, pos_grid=10**6), ("pos_grid",), "is 1000000; at most 4096 is supported"),
        (dataclasses.replace(SPEC, name="a" * 101), ("name",), "has 101 characters; use at most 100"),
        (changed("modalities", 1, resolution_m=0.0), ("modalities", 1, "resolution_m"), "is 0, must be a positive"),
        (changed("modalities", 1, resolution_m=-10.0), ("modalities", 1, "resolution_m"), "is -10, must be"),
        (changed("modalities", 1, resolution_m=math.nan), ("modalities", 1, "resolution_m"), "is nan, must be"),
        (changed("modalities", 1, resolution_m=21.0), ("modalities", 1, "resolution_m"), "6 pixels of 21 m are 126 m"),
        (changed("modalities", 1, resolution_m=4.9), ("modalities", 1, "resolution_m"), "but a tile has 60 m"),
        (changed("modalities", 0, size=-24), ("modalities", 0), "has 3 bands of -24 pixels a side"),
        (changed("modalities", 0, size=16_384), ("modalities", 0, "size"), "an image takes more than 512 MiB"),
        (changed("modalities", 0, size=32_769), ("modalities", 0, "size"), "3 channels of 32769 pixels a side"),
        (changed("targets", 1, threshold=math.nan), ("targets", 1, "threshold"), "is nan, must be an area share"),
        (changed("targets", 1, threshold=-0.1), ("targets", 1, "threshold"), "is -0.1, must be an area share"),
        (changed("targets", 1, threshold=1.0), ("targets", 1, "threshold"), "is 1, must be an area share"),
        (changed("targets", 1, classes=("a", "b", "a")), ("targets", 1, "classes"), "'a' is there twice"),
        (changed("targets", 0, ignored=(0, 1, 2)), ("targets", 0, "ignored"), "contains every class"),
        (changed("targets", 0, ignored=(256,)), ("targets", 0, "ignored"), "contains 256, which is not a stored"),
        (changed("targets", 0, ignored=(-1,)), ("targets", 0, "ignored"), "contains -1, which is not a stored"),
        (changed("targets", 0, classes=tuple(map(str, range(257)))), ("targets", 0, "classes"), "has 257 classes"),
        (changed("targets", 0, resolution_m=0.0), ("targets", 0, "resolution_m"), "is 0, must be a positive"),
        (changed("targets", 0, resolution_m=0.001), ("targets", 0, "resolution_m"), "gives 60000 pixels per side"),
        (changed("targets", 0, resolution_m=200.0), ("targets", 0, "resolution_m"), "gives 0 pixels per side"),
        (changed("sensors", 0, scale=Scale("linear", 0.0)), ("sensors", 0, "scale", "divisor"), "is 0, must be"),
        (changed("sensors", 0, scale=Scale("log", -5.0)), ("sensors", 0, "scale", "divisor"), "is -5, must be"),
        (changed("sensors", 0, scale=Scale("linear", math.nan)), ("sensors", 0, "scale", "divisor"), "is nan"),
        (changed("sensors", 0, scale=Scale("linear", math.inf)), ("sensors", 0, "scale", "divisor"), "is inf"),
        (changed("sensors", 1, mask_threshold=math.nan), ("sensors", 1, "mask_threshold"), "is nan, must be a perc"),
        (changed("sensors", 1, mask_threshold=-1.0), ("sensors", 1, "mask_threshold"), "is -1, must be a percentage"),
        (changed("sensors", 1, mask_threshold=101.0), ("sensors", 1, "mask_threshold"), "is 101, must be a perc"),
        (changed("sensors", 1, num_dates=5000), ("sensors", 1, "num_dates"), "is 5000; at most 4096 is supported"),
        (changed("sensors", 0, image_size=40_000), ("sensors", 0, "image_size"), "is 40000; at most 32768"),
        (changed("sensors", 0, band_groups=(4, -1)), ("sensors", 0, "band_groups"), "a group of less than one band"),
        (changed("sensors", 0, token_groups=(3, 0)), ("sensors", 0, "token_groups"), "a group of less than one band"),
        (changed("sensors", 0, group="s2.a"), ("sensors", 0, "group"), "'s2.a' is not a valid name"),
        (changed("sensors", 0, embed=""), ("sensors", 0, "embed"), "'' is not a valid name"),
        (changed("sensors", 0, name="keys"), ("sensors", 0, "name"), "'keys' is reserved by torch"),
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


def test_a_crop_has_no_more_pixels_than_a_tile():
    # 24 pixels of 2.5 m; a modality with 8 of them covers 20 m only.
    spec = changed("modalities", 0, size=8)
    assert list(crop_problems(spec)) == [(("crop_m",), "30 m are 12 pixels of aerial, which has 8 per side")]


def test_the_reserved_names_are_those_of_torch():
    module = torch.nn.ModuleDict()
    # Of torch only: transformers, which other tests import, adds a method to every module.
    attributes = {
        name
        for name in dir(module)
        if not name.startswith("_")
        and getattr(getattr(module, name), "__module__", "torch").startswith("torch")
    }
    assert {"keys", "forward", "state_dict", "training"} <= attributes
    assert attributes - set(spec_limits._MODULE_ATTRIBUTES.split()) == set()
    with pytest.raises(KeyError, match="already exists"):
        torch.nn.ModuleDict({"keys": torch.nn.Identity()})


def test_many_names_take_no_quadratic_time():
    sensors = tuple(dataclasses.replace(S2, name=f"s{i}") for i in range(100_000))
    started = time.perf_counter()
    found = list(spec_problems(dataclasses.replace(SPEC, sensors=sensors)))
    assert found == [(("sensors",), "has 100000 entries; at most 1000 are supported")]
    assert time.perf_counter() - started < 1


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

"""Rasters that store nodata: selection of dates, filled pixels and incomplete patches of a sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor, Tile
from maestro_scale.model.embed import _nearest
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.stream import dates
from maestro_scale.stream.batch import digest
from maestro_scale.stream.packing import BatchMetadata, arrays_in, num_bytes, unpack
from maestro_scale.stream.rng import CounterRNG, Purpose
from maestro_scale.stream.sensor_transform import nearest_pixels
from maestro_scale.stream.tile import tile_batch
from maestro_scale.stream.transform import Transform

SIZE = 6


def spec(
    dtype: str, num_dates: int, bands: tuple[str, ...] = ("cloud", "nodata"), image_size: int = 6
) -> DatasetSpec:
    modality = Modality("x", ("a", "b"), 10.0, SIZE, dtype, series=True, mask_bands=bands)
    sensor = Sensor("x", "x", image_size, 2, num_dates, (0, 1), (2,), Scale(), "x", "x")
    return DatasetSpec("toy", "Toy", 60.0, 60.0, 6, (modality,), (), (sensor,))


def tile(nodata: np.ndarray, dtype: str = "int16", cloud: np.ndarray | None = None) -> Tile:
    """Pixels of date t are 100 (t + 1), 0 or NaN below nodata (T, H, W)."""
    num = len(nodata)
    values = np.broadcast_to(100 * (1 + np.arange(num))[:, None, None, None], (num, 2, SIZE, SIZE)).astype(
        dtype
    )
    values[np.broadcast_to(nodata[:, None], values.shape)] = np.nan if np.dtype(dtype).kind == "f" else 0
    cloud = np.zeros(num, np.uint8) if cloud is None else cloud
    mask = np.stack([np.broadcast_to(cloud[:, None, None], nodata.shape), 100 * nodata], axis=1).astype(
        np.uint8
    )
    days = np.stack([np.full(num, 2020), 1 + np.arange(num), np.zeros(num)], axis=1).astype(np.int16)
    return Tile("t", {"x": values}, {"x": days}, {"x": mask}, {}, days[0])


def prepare(spec: DatasetSpec, tile: Tile, number: int | None, flips: bool = False):
    """Pixels (D, 2, S, S), days (D,), incomplete patches (D, L) and the number of repeated or imputed dates."""
    transform = Transform(spec, flips=flips)
    block = torch.zeros(num_bytes(transform.fields, 1), dtype=torch.uint8)
    arrays = arrays_in(block, transform.fields, 1)
    sample = Sample(encode(tile))
    count = (
        transform.evaluate(sample, 0, arrays, 0)
        if number is None
        else transform.train(sample, 0, number, arrays, 0)
    )
    found = {f.part: a[0] for f, a in arrays.items()}
    return found["pixels"], found["dates"][:, 1].tolist(), found.get("nodata"), count


def corner(num: int, *which: int) -> np.ndarray:
    """nodata (T, H, W) with the upper left pixel marked at these dates."""
    nodata = np.zeros((num, SIZE, SIZE), bool)
    nodata[list(which), 0, 0] = True
    return nodata


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("number", [None, *range(8)])
def test_a_date_with_nodata_is_chosen_last_and_filled_in(dtype, number):
    """Two bins of two dates: the first has a cloudy date and one with nodata, the second nothing else than nodata."""
    nodata = corner(4, 1, 2, 3)
    pixels, days, incomplete, count = prepare(
        spec(dtype, 2), tile(nodata, dtype, np.array([90, 0, 0, 0], np.uint8)), number
    )
    assert days[0] == 1  # the cloudy one
    assert days[1] in (3, 4)
    assert count == 1
    # The pixel is that of the only date that has it, the others are as stored.
    assert pixels[1, :, 0, 0].tolist() == [100, 100]
    assert (pixels[1, :, 1:] == 100 * days[1]).all()
    assert incomplete.tolist() == [[False] * 9, [True] + [False] * 8]


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("number", [None, 0, 1])
def test_a_date_without_valid_pixels_is_chosen_only_if_there_is_no_other(dtype, number):
    nodata = np.ones((5, SIZE, SIZE), bool)
    nodata[[1, 4]] = False
    pixels, days, incomplete, count = prepare(spec(dtype, 2), tile(nodata, dtype), number)
    assert (days, count) == ([2, 5], 0)
    assert not incomplete.any()
    # Too few: valid dates are repeated.
    _, days, _, count = prepare(spec(dtype, 3), tile(nodata, dtype), number)
    assert (days, count) == ([2, 2, 5], 1)
    # None: nothing to fill in with, and nothing counts.
    pixels, _, incomplete, _ = prepare(spec(dtype, 2), tile(np.ones((5, SIZE, SIZE), bool), dtype), number)
    assert (pixels == 0).all()
    assert incomplete.all()


def test_one_image_is_filled_with_the_mean_of_its_band():
    nodata = corner(1, 0)
    one = tile(nodata, "int16")
    one.arrays["x"][0, 1] = np.arange(36).reshape(6, 6)
    pixels, _, incomplete, _ = prepare(spec("int16", 1), one, None)
    assert pixels[0, :, 0, 0].tolist() == [100, 18]  # the mean of 1 … 35
    assert incomplete[0].tolist() == [True] + [False] * 8


def test_the_patches_are_those_of_the_resized_and_turned_pixels():
    """A pixel is marked where its value is odd: so is a patch of the network's input."""
    rng = np.random.default_rng(0)
    for size in (2, 4, 6, 8, 10):
        values = rng.integers(0, 4, (1, 2, SIZE, SIZE)).astype(np.int16) * 2 + 100
        odd = rng.random((1, SIZE, SIZE)) < 0.1
        values[:, 0] += odd
        one = tile(np.zeros((1, SIZE, SIZE), bool), "int16")
        one.masks["x"][:, 1] = 100 * odd
        for number in range(6):
            toy = spec("int16", 1, image_size=size)
            _, _, incomplete, _ = prepare(toy, replace(one, arrays={"x": values}), number, flips=True)
            # Marked pixels are filled in, so the odd ones are read from a copy without marks.
            clear = replace(one, arrays={"x": values}, masks={"x": np.zeros_like(one.masks["x"])})
            seen, *_ = prepare(toy, clear, number, flips=True)
            resized = (
                _nearest(_nearest(torch.from_numpy(seen[None]), size, 3), size, 4)[0, 0, 0].numpy() % 2 == 1
            )
            expected = resized.reshape(size // 2, 2, size // 2, 2).any(axis=(1, 3)).reshape(-1)
            np.testing.assert_array_equal(incomplete[0], expected)


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_pixels_of_the_input_are_those_of_the_model(old, new):
    expected = _nearest(torch.arange(old)[None, None, :], new, 2)[0, 0].numpy()
    np.testing.assert_array_equal(nearest_pixels(old, new), expected)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=12), st.integers(0, 99))
def test_every_bin_gives_a_date_of_its_best_rank(states, number):
    num_dates = 3
    marked = np.array([m for m, _ in states])
    nodata = np.array([n for _, n in states])[:, None, None] & np.eye(2, dtype=bool)
    ranks = dates.rank(marked, nodata)
    assert ranks.tolist() == [2 if n else int(m) for m, n in states]
    pixels = np.zeros((len(states), 1, 2, 2), np.int16)
    rng = CounterRNG(0, Purpose.SAMPLE).seek(0, number)
    chosen, _ = dates.draw(len(states), num_dates, ranks, lambda i: pixels[i], rng)
    rest = len(states) % num_dates
    possible = [dates.bins(len(states), num_dates, skip) for skip in range(rest + 1)]
    assert any(
        all(c in row and ranks[c] == ranks[row].min() for c, row in zip(chosen, b, strict=True))
        for b in possible
    )


def test_a_raster_without_invalid_pixels_draws_what_one_without_the_band_draws():
    clear = tile(np.zeros((9, SIZE, SIZE), bool), cloud=np.array([0, 90] * 4 + [0], np.uint8))
    plain = replace(clear, masks={"x": clear.masks["x"][:, :1]})
    for number in range(10):
        pixels, days, _, _ = prepare(spec("int16", 3), clear, number)
        transform = Transform(spec("int16", 3, bands=("cloud",)), flips=False)
        block = torch.zeros(num_bytes(transform.fields, 1), dtype=torch.uint8)
        arrays = arrays_in(block, transform.fields, 1)
        transform.train(Sample(encode(plain)), 0, number, arrays, 0)
        found = {f.part: a[0] for f, a in arrays.items()}
        assert "nodata" not in found
        assert found["dates"][:, 1].tolist() == days
        np.testing.assert_array_equal(found["pixels"], pixels)


@pytest.mark.parametrize("number", [None, 3])
def test_percentages_below_100_are_a_mask_like_others(number):
    """Of shards from before the marks: pixels that are measured in part are neither filled in nor left out."""
    percentages = np.zeros((6, SIZE, SIZE), np.uint8)
    percentages[::2, 1:, 2] = 99
    old = tile(np.zeros(percentages.shape, bool))
    old.masks["x"][:, 1] = percentages
    found = prepare(spec("int16", 3), old, number)
    other = prepare(spec("int16", 3, bands=("cloud", "haze")), old, number)
    assert found[1] == other[1]  # dates
    np.testing.assert_array_equal(found[0], other[0])
    assert not found[2].any()


def test_a_tile_that_is_embedded_has_no_nan():
    nodata = corner(3, 0, 1)
    toy = spec("float32", 3)
    batch = tile_batch(tile(nodata, "float32"), toy.sensors)
    assert batch.pixels["x"][0, :, 0, 0, 0].tolist() == [300, 300, 300]
    assert batch.pixels["x"][0, :, 1, 5, 5].tolist() == [100, 200, 300]


def test_the_marks_travel_with_the_batch():
    transform = Transform(spec("int16", 2))
    block = torch.zeros(num_bytes(transform.fields, 2), dtype=torch.uint8)
    arrays = arrays_in(block, transform.fields, 2)
    for row, nodata in enumerate((corner(2, 0), corner(2))):
        transform.evaluate(Sample(encode(tile(nodata))), 0, arrays, row)
    batch = unpack(block, transform.fields, BatchMetadata("toy", ("a", "b"), ("a", "b"), 0, 0))
    assert batch.nodata["x"].dtype == torch.bool
    assert batch.nodata["x"].sum(dim=(1, 2)).tolist() == [1, 0]
    assert torch.equal(batch.to("cpu").nodata["x"], batch.nodata["x"])
    assert batch.first().nodata["x"].shape == (1, 2, 9)
    before = digest(batch)
    batch.nodata["x"][1, 0, 0] = True
    assert digest(batch) != before

"""The transform of one sample."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maestro_scale.datasets import open_raw
from maestro_scale.datasets.spec import DatasetSpec, Sensor, Tile
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.stream.packing import arrays_in, num_bytes
from maestro_scale.stream.source import Source
from maestro_scale.stream.transform import Transform

REPO = Path(__file__).parents[2]
REAL = Path(os.environ.get("MAESTRO_TREESATAI_DIR", REPO.parent / "shared" / "data" / "treesatai_ts"))

Prepared = dict[tuple[str, str], np.ndarray]


def spec_of(toy: Source, **changes) -> DatasetSpec:
    return replace(toy.spec, **changes)


def prepare(
    spec: DatasetSpec,
    tile: Tile,
    number: int | None = 0,
    epoch: int = 0,
    seed: int = 0,
    dataset: int = 0,
    crop: int = 0,
    flips: bool = True,
) -> tuple[Prepared, int]:
    """{(part, name): array} of one sample; evaluation if ``number`` is None."""
    transform = Transform(spec, seed, dataset, flips)
    block = torch.zeros(num_bytes(transform.fields, 1), dtype=torch.uint8)
    arrays = arrays_in(block, transform.fields, 1)
    sample = Sample(encode(tile, "raw"))
    if number is None:
        filled = transform.evaluate(sample, crop, arrays, 0)
    else:
        filled = transform.train(sample, epoch, number, arrays, 0)
    return {(f.part, f.name): a[0] for f, a in arrays.items()}, filled


def same(a: Prepared, b: Prepared) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_sample_depends_on_seed_epoch_number_and_dataset_alone(toy: Source, tile_of: Callable[[int], Tile]):
    spec, tile = spec_of(toy), tile_of(3)
    first, _ = prepare(spec, tile)
    assert same(first, prepare(spec, tile)[0])
    for change in ({"number": 1}, {"epoch": 1}, {"seed": 1}, {"dataset": 1}):
        other, _ = prepare(spec, tile, **change)
        assert all(not np.array_equal(first[k], other[k]) for k in first if k[0] == "noise")


def test_another_sensor_changes_nothing_for_the_others(toy: Source, tile_of: Callable[[int], Tile]):
    whole, _ = prepare(spec_of(toy), tile_of(3))
    part, _ = prepare(spec_of(toy, sensors=toy.spec.sensors[1:]), tile_of(3))
    assert all(np.array_equal(whole[k], v) for k, v in part.items())
    assert part.keys() < whole.keys()


def test_noise_is_uniform_and_of_the_models_length(toy: Source, tile_of: Callable[[int], Tile]):
    noise = [prepare(spec_of(toy), tile_of(0), n)[0]["noise", "s2"] for n in range(200)]
    values = np.stack(noise)
    assert values.dtype == np.float32
    assert 0 <= values.min() < 0.01 < 0.99 < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.25


def test_all_sensors_and_targets_are_cropped_and_flipped_alike(toy: Source, tile_of: Callable[[int], Tile]):
    # Rasters that tell where they are: the coarse pixel over each fine one must agree, whatever was drawn.
    places = np.arange(36).reshape(6, 6)
    tile = tile_of(0)
    fine = np.kron(places, np.ones((4, 4))).astype(np.uint8)
    tile = replace(
        tile,
        arrays={
            "aerial": np.broadcast_to(fine, (1, 3, 24, 24)).copy(),
            "s2": np.broadcast_to(places, (5, 2, 6, 6)).astype(np.int16),
            "s1": np.broadcast_to(places, (7, 2, 6, 6)).astype(np.float32),
        },
        masks={"s2": np.zeros((5, 2, 6, 6), np.uint8)},
        targets={**tile.targets, "cover": places.astype(np.uint8)},
    )
    seen = set()
    for number in range(100):
        out, _ = prepare(spec_of(toy), tile, number)
        cover = out["targets", "cover"]
        assert cover.shape == (3, 3)
        np.testing.assert_array_equal(out["pixels", "s2"][0, 0], cover)
        np.testing.assert_array_equal(out["pixels", "s1"][1, 1], cover)
        np.testing.assert_array_equal(out["pixels", "aerial"][0, 2], np.kron(cover, np.ones((4, 4))))
        seen.add(cover.tobytes())
    assert len(seen) > 64  # of 4 × 4 places in 8 orientations


def test_crop_orientation_and_noise_are_computed_from_the_words(toy: Source, tile_of: Callable[[int], Tile]):
    # Words of Philox: key (seed 0, 2 << 32), counter (0, stream, sample, epoch 2). Those of stream 0 give
    # word * 4 // 2**64 as the row and column of the crop, and the 3 highest bits of the third word as symmetries.
    # Sample 9: row 0, column 3, columns flipped, transposed. Sample 7: row 2, column 1, rows flipped.
    places = np.arange(36, dtype=np.uint8).reshape(6, 6)
    tile = replace(tile_of(0), targets={**tile_of(0).targets, "cover": places})
    expected = {
        9: [[5, 11, 17], [4, 10, 16], [3, 9, 15]],
        7: [[25, 26, 27], [19, 20, 21], [13, 14, 15]],
    }
    for number, cover in expected.items():
        out, _ = prepare(spec_of(toy), tile, number, epoch=2)
        assert out["targets", "cover"].tolist() == cover
    # Noise is a half word's 24 highest bits / 2**24. The stream of "aerial" begins with it, as its one date is not
    # drawn. Of "s2" 5 dates are stored and 3 wanted: their 5 words, and one for the rest, come first.
    out, _ = prepare(spec_of(toy), tile, 9, epoch=2)
    assert (out["noise", "aerial"][:2] * 2**24).tolist() == [12910318, 2453178]
    assert (out["noise", "s2"][:2] * 2**24).tolist() == [10024792, 3068887]
    # With as many dates stored as wanted there is nothing to draw either.
    sensor = replace(toy.spec.sensors[1], num_dates=5)
    out, _ = prepare(spec_of(toy, sensors=(sensor,)), tile, 9, epoch=2)
    assert (out["noise", "s2"][:2] * 2**24).tolist() == [5527984, 6783674]


def test_every_offset_is_drawn(toy: Source, tile_of: Callable[[int], Tile]):
    # 60 m in steps of 10 m: a crop of 30 m begins at 4 rows and 4 columns.
    places = np.arange(36, dtype=np.uint8).reshape(6, 6)
    tile = replace(tile_of(0), targets={**tile_of(0).targets, "cover": places})
    drawn = [prepare(spec_of(toy), tile, n, flips=False)[0]["targets", "cover"][0, 0] for n in range(200)]
    assert {int(p) for p in drawn} == {6 * row + column for row in range(4) for column in range(4)}


def test_flips_can_be_switched_off(toy: Source, tile_of: Callable[[int], Tile]):
    aerial = [prepare(spec_of(toy), tile_of(0), n, flips=False)[0]["pixels", "aerial"] for n in range(50)]
    assert all((np.diff(a.astype(int), axis=-1) == 1).all() for a in aerial)


def test_bands_are_taken_in_the_sensors_order(toy: Source, tile_of: Callable[[int], Tile]):
    tile = tile_of(0)
    for bands in ((2, 0), (1,), (1, 2), (0, 1, 2)):
        sensor = replace(toy.spec.sensors[0], bands=bands, band_groups=(len(bands),))
        out, _ = prepare(spec_of(toy, sensors=(sensor,), crop_m=60.0), tile, None)
        np.testing.assert_array_equal(out["pixels", "aerial"], tile.arrays["aerial"][:, list(bands)])


def test_native_dtypes_are_kept(toy: Source, tile_of: Callable[[int], Tile]):
    out, _ = prepare(spec_of(toy), tile_of(0))
    dtypes = {name: a.dtype.name for (part, name), a in out.items() if part == "pixels"}
    assert dtypes == {"aerial": "uint8", "s2": "int16", "s1": "float32"}


def test_evaluation_draws_nothing_and_covers_the_tile(toy: Source, tile_of: Callable[[int], Tile]):
    tile, spec = tile_of(7), spec_of(toy)
    crops = [prepare(spec, tile, None, crop=i)[0] for i in range(4)]
    assert not any(c["noise", s.name].any() for c in crops for s in toy.spec.sensors)
    quarters = [c["pixels", "aerial"] for c in crops]
    whole = np.concatenate([np.concatenate(quarters[i : i + 2], axis=-1) for i in (0, 2)], axis=-2)
    np.testing.assert_array_equal(whole, tile.arrays["aerial"])


def test_repeated_and_imputed_dates_are_counted(toy: Source, tile_of: Callable[[int], Tile]):
    tile = tile_of(0)
    short = replace(
        tile,
        arrays={**tile.arrays, "s1": np.full((1, 2, 6, 6), np.nan, np.float32)},
        dates={**tile.dates, "s1": tile.dates["s1"][:1]},
    )
    for number in (0, None):
        assert prepare(spec_of(toy), tile, number)[1] == 0
        out, filled = prepare(spec_of(toy), short, number)
        assert filled == 3  # one repeated, both filled
        assert np.isfinite(out["pixels", "s1"]).all()


def test_a_series_of_exactly_num_dates_is_used_as_it_is(toy: Source, tile_of: Callable[[int], Tile]):
    sensor = replace(toy.spec.sensors[1], num_dates=5)
    out, _ = prepare(spec_of(toy, sensors=(sensor,), crop_m=60.0), tile_of(0), flips=False)
    np.testing.assert_array_equal(out["pixels", "s2"], tile_of(0).arrays["s2"])


@pytest.mark.parametrize(
    ("sensor", "reason"),
    [
        ({"bands": (0, 3)}, r"toy\.sensors\.aerial\.bands: \[0, 3\] do not index the 3 bands of aerial"),
        ({"bands": ()}, r"toy\.sensors\.aerial\.bands: \[\] do not index"),
    ],
)
def test_a_sensor_with_missing_bands_is_refused(toy: Source, sensor: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        Transform(spec_of(toy, sensors=(replace(toy.spec.sensors[0], **sensor),)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("aerial", np.zeros((1, 1, 24, 24), np.uint8)),
        ("aerial", np.zeros((1, 3, 24, 24), np.float32)),
        ("aerial", np.zeros((1, 3, 12, 12), np.uint8)),
        ("cover", np.zeros((6, 1), np.uint8)),
        ("cover", np.zeros((6, 6), np.int32)),
        ("kind", np.zeros(1, np.float32)),
    ],
)
@pytest.mark.parametrize("number", [0, None])
def test_a_sample_that_does_not_match_the_spec_is_refused(
    toy: Source, tile_of: Callable[[int], Tile], field: str, value: np.ndarray, number: int | None
):
    tile = tile_of(0)
    part = "arrays" if field == "aerial" else "targets"
    wrong = replace(tile, **{part: {**getattr(tile, part), field: value}})
    with pytest.raises(CodecError, match=f"sample tile-00000: (target.)?{field} is"):
        prepare(spec_of(toy), wrong, number)


def scaled(sensor: Sensor, pixels: np.ndarray) -> np.ndarray:
    values = pixels.astype(np.float32)
    if sensor.scale.kind == "log":
        values = np.log(np.maximum(values, 1e-10))
    return values / np.float32(sensor.scale.divisor)


def test_evaluation_of_the_real_tile_equals_the_reference():
    expected_path = REAL.with_name(REAL.name + "_prepared.npz")
    if not (REAL.is_dir() and expected_path.is_file()):
        pytest.skip(f"no real TreeSatAI-TS tile at {REAL} (set MAESTRO_TREESATAI_DIR)")
    dataset = open_raw("treesatai_ts", REAL, "train")
    spec, expected = dataset.spec, np.load(expected_path)
    out, filled = prepare(spec, dataset.read(dataset.keys()[0]), None)
    assert filled == 0
    for sensor in spec.sensors:
        pixels = scaled(sensor, out["pixels", sensor.name])
        np.testing.assert_allclose(pixels, expected[sensor.name], rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(out["dates", sensor.name], expected[f"{sensor.name}_dates"])
    np.testing.assert_array_equal(out["ref_date", ""], expected["ref_date"][0])
    positive = out["targets", "species"] > spec.target("species").threshold
    np.testing.assert_array_equal(positive, expected["treesat_mlc_thresh"].astype(bool))

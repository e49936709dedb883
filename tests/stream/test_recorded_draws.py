"""Training draws the numbers that an earlier revision (9e95cee) drew from the same shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from maestro_scale.recipe import parse_recipe, resolve_spec
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch, digest
from maestro_scale.stream.dates import FirstDate
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source

SHARDS = Path(__file__).parents[1] / "fixtures" / "shards"

# The first batches of the first two epochs there.
BATCHES = [
    "dc12cedc5b8220d0ee97110d92f32f5d9c8b72672aad6508e4b5c76b46fb97a6",
    "711b1d169a08724c6d6d035b82491da52b491490ab1f2d8ff448a4eca07bd529",
]
NOISE = [{"s2": "118fea0a869f4678", "s1_asc": "80ec3452bccee4f1"}]
NOISE += [{"s2": "ecddadcaa08788c7", "s1_asc": "28a30a9a6d6853e7"}]
# Days of the year of sentinel-1, of which 11 dates are stored for 3, so 2 are left out.
DAYS = [[[179, 270, 354], [6, 90, 181], [2, 86, 170], [7, 119, 210], [190, 274, 358]]]
DAYS += [[[4, 88, 179], [7, 119, 210], [170, 261, 359], [90, 181, 279], [1, 92, 190]]]


def batches(cache: Path, first_date: FirstDate, spectral="joint") -> list[Batch]:
    manifest = Manifest.load(str(SHARDS))
    sensors = {"s2": {"num_dates": 5}, "s1_asc": {"num_dates": 3}}
    mixture = [{"dataset": "treesatai_ts", "shards": str(SHARDS), "sensors": sensors}]
    entry = parse_recipe({"name": "x", "data": {"mixture": mixture}}).data.mixture[0]
    spec = resolve_spec(manifest.spec, entry, spectral=spectral)
    source = Source(spec, manifest.shards_of(("train",)), Store(str(SHARDS), cache, 2**30))
    loader = TrainLoader((source,), 5, lanes=1, global_batch=5, micro_batch=5, first_date=first_date)
    try:
        return [step.batches[0] for step in loader.steps(0, 2)]
    finally:
        loader.close()


def noise_of(batch: Batch) -> dict[str, str]:
    return {name: hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] for name, x in batch.noise.items()}


def test_a_joint_run_draws_the_same_numbers(tmp_path):
    found = batches(tmp_path, "ends")
    assert [digest(b) for b in found] == BATCHES
    assert [noise_of(b) for b in found] == NOISE


def test_another_first_date_changes_nothing_but_dates_and_their_pixels(tmp_path):
    found, before = batches(tmp_path, "any"), batches(tmp_path, "ends")
    assert [noise_of(b) for b in found] == NOISE
    for new, old in zip(found, before, strict=True):
        assert new.keys == old.keys
        # 11 dates for 5 leave 1 out: the bins begin at 0 or 1 in both cases.
        assert new.pixels["s2"].equal(old.pixels["s2"])
    days = [b.dates["s1_asc"][:, :, 1].tolist() for b in before]
    assert days == DAYS
    # The first sample of the first batch and the third of the second begin at the date between the two ends.
    days[0][0], days[1][2] = [88, 179, 270], [86, 170, 261]
    assert [b.dates["s1_asc"][:, :, 1].tolist() for b in found] == days


@pytest.mark.parametrize(("spectral", "s2", "s1"), [("joint", 1, 1), ("token", 3, 2)])
def test_tokens_of_band_groups_have_numbers_of_their_own(tmp_path, spectral, s2, s1):
    noise = batches(tmp_path, "any", spectral)[0].noise
    # 9 places: a number for each token; 8 times one for the modality, the dates, the places and the groups.
    assert noise["s2"].shape == (5, 5 * 9 * s2 + 8 * (1 + 5 + 9 + s2))
    assert noise["s1_asc"].shape == (5, 3 * 9 * s1 + 8 * (1 + 3 + 9 + s1))

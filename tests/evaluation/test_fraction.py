"""Fractions of the training labels: their size, stratification and nesting."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_scale.evaluation.benchmark import Benchmark, Provenance
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.fraction import stratified_sample
from maestro_scale.evaluation.tasks.subset import class_weights, labelled_subset
from maestro_scale.interop.pretrained import load_model
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source
from tests.evaluation.conftest import FIELDS, SPLITS, field_tile

CROPS_PER_TILE = 4


def one_class_each(num_samples: int, num_classes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(num_classes))
    return np.eye(num_classes)[rng.choice(num_classes, num_samples, p=shares)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 9), st.floats(0.001, 1), st.floats(0.001, 1))
def test_a_smaller_fraction_is_part_of_a_larger_one(num_samples, num_classes, seed, a, b):
    weights = one_class_each(num_samples, num_classes, seed)
    small, large = stratified_sample(weights, min(a, b), seed), stratified_sample(weights, max(a, b), seed)
    assert set(small) <= set(large)
    assert len(small) == max(round(min(a, b) * num_samples), 1)
    assert (np.diff(small) > 0).all()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_every_class_has_its_share_to_one_sample(fraction):
    weights = one_class_each(2000, 15, 3)
    used = stratified_sample(weights, fraction)
    assert np.abs(weights[used].sum(0) - fraction * weights.sum(0)).max() < 1.01


def test_several_labels_or_pixels_keep_their_shares_better_than_chance():
    rng = np.random.default_rng(0)
    for weights in (rng.random((2000, 8)) < np.geomspace(0.6, 0.02, 8), pixels(rng)):
        weights = weights.astype(float)
        share = weights.sum(0)

        def off(used, weights=weights, share=share):
            return np.abs(weights[used].sum(0) / share - 0.1).mean()

        by_chance = np.mean([off(rng.choice(2000, 200, replace=False)) for _ in range(20)])
        assert off(stratified_sample(weights, 0.1)) < 0.7 * by_chance


def test_samples_without_a_label_are_taken_too_and_another_seed_draws_others():
    weights = np.zeros((400, 3))
    weights[:100, 0] = 1
    used = stratified_sample(weights, 0.1, seed=1)
    assert (used < 100).sum() == 10
    assert set(used) != set(stratified_sample(weights, 0.1, seed=2))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_other_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        stratified_sample(np.ones((3, 1)), fraction)


def pixels(rng: np.random.Generator) -> np.ndarray:
    """Pixels of 8 classes, common and rare, in 2,000 tiles of 64 x 64; few classes a tile."""
    shares = rng.gamma(0.1, 1, (2000, 8)) * np.geomspace(0.6, 0.02, 8)
    return (4096 * shares / shares.sum(1, keepdims=True)).round()


def source_of(shards, split, tmp_path) -> Source:
    store = Store(str(shards), tmp_path / "cache", 2**30)
    return Source(FIELDS, Manifest.load(str(shards)).shards_of([split]), store)


def test_labels_are_counted_as_they_are_stored(fields, tmp_path):
    source = source_of(fields.shards, "val", tmp_path)
    weights = class_weights(source, FIELDS.target("cover"))
    keys = [b.tiles[0] for b in EvalLoader(source, 1, crops=1)]
    for key, counted in zip(keys, weights, strict=True):
        cover = field_tile(int(key[-3:])).targets["cover"]
        assert counted.tolist() == [(cover == c).sum() for c in (0, 2, 3)]


def test_both_loaders_read_the_chosen_samples_alone(fields, tmp_path):
    source = source_of(fields.shards, "train", tmp_path)
    whole = [b.tiles[0] for b in EvalLoader(source, 1, crops=1)]
    used = labelled_subset(source, FIELDS.target("cover"), 0.3, seed=0)
    part = source.select_samples(used)
    assert [b.tiles[0] for b in EvalLoader(part, 1, crops=1)] == [whole[i] for i in used]
    loader = TrainLoader((part,), seed=0, lanes=2, global_batch=6, micro_batch=3)
    seen = [t for step in loader.steps(0, 3) for b in step.batches for t in b.tiles]
    assert sorted(seen) == sorted(3 * [whole[i] for i in used])


def test_a_fraction_is_taken_from_what_was_encoded_for_all(fields, tmp_path, monkeypatch):
    model, fitted_on = load_model(fields.model), []
    knn = dense.knn

    def noted(layout, num_classes, train, val, test, seed, device):
        fitted_on.append({int(tile) for tile in train.tiles})
        assert len(train) == CROPS_PER_TILE * len(fitted_on[-1])
        return knn(layout, num_classes, train, val, test, seed, device)

    monkeypatch.setattr(dense, "knn", noted)

    def score(fraction, seed=0):
        benchmark = Benchmark(
            FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features", fraction=fraction
        )
        return evaluate_frozen(model, benchmark, ["knn"], Provenance(seed=seed))[0]

    assert score(1.0).fraction == 1.0
    model.encode = None  # nothing is encoded again
    parts = [score(0.1), score(0.3), score(0.3), score(0.3, seed=1)]
    assert [p.fraction for p in parts] == [0.1, 0.3, 0.3, 0.3]
    assert {p.num_tiles for p in parts} == {SPLITS["test"]}
    assert [len(tiles) for tiles in fitted_on] == [20, 2, 6, 6, 6]
    assert fitted_on[1] < fitted_on[2] == fitted_on[3] != fitted_on[4]
    with pytest.raises(EvaluationError, match="a fraction of 10: give one above 0 and at most 1"):
        score(10)


def test_the_list_of_the_release_is_used_where_there_is_one(fields, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(fields.shards, shards)
    with Writer(str(shards), FIELDS, "train_filtered_10") as writer:
        for number in (3, 5):
            writer.add(field_tile(number))
    benchmark = Benchmark(FIELDS, str(shards), tmp_path / "cache", tmp_path / "features", fraction=0.1)
    evaluate_frozen(load_model(fields.model), benchmark, ["knn"])
    assert {p.name.rpartition("-")[0] for p in (tmp_path / "features").iterdir()} == {
        "train_filtered_10",
        "val",
        "test",
    }


@pytest.mark.parametrize(
    ("samples", "fraction", "expected"),
    [(10, 0.25, 2), (10, 0.35, 4), (10, 0.36, 4), (10, 0.34, 3), (3, 0.01, 1), (3, 1.0, 3)],
)
def test_the_number_of_samples_is_rounded_and_at_least_one(samples, fraction, expected):
    assert len(stratified_sample(np.ones((samples, 1)), fraction)) == expected


def test_every_class_is_evenly_spread():
    # Three of four samples are of class 0: of two, one is of class 0, as its first is due after 1/6 of all samples and
    # that of class 1 after 1/2.
    weights = np.eye(2)[[0, 0, 1, 0]]
    for seed in range(10):
        (first,) = stratified_sample(weights, 0.25, seed)
        assert first != 2
    shuffled = np.eye(2)[[0, 1] * 20]
    for seed in range(5):
        for count in range(2, 40, 2):
            taken = stratified_sample(shuffled, count / 40, seed)
            assert shuffled[taken].sum(0).tolist() == [count / 2, count / 2]


def test_the_best_fitting_candidate_is_chosen():
    # Sample 0 is of class a, 1 of b, 2 of both. Class a lags first; after one of three samples every class should have
    # a third of its samples. Sample 0 gives (1/2, 0): 1/36 + 1/9 off. Sample 2 gives (1/2, 1/2): 2/36 off.
    weights = np.array([[1, 0], [0, 1], [1, 1]])
    assert [stratified_sample(weights, 1 / 3, seed).tolist() for seed in range(5)] == [[2]] * 5


def test_the_samples_of_a_fraction_are_stable():
    # A change here changes every published score with few labels.
    weights = np.eye(3)[[0, 1, 2, 0, 0, 1, 2, 0, 1, 0, 0, 1]]
    assert stratified_sample(weights, 0.5, seed=1).tolist() == [0, 1, 2, 4, 10, 11]
    assert stratified_sample(weights, 0.5, seed=2).tolist() == [0, 1, 4, 6, 8, 9]

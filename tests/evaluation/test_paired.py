"""Comparison of runs over seeds and tiles, with values computed by hand.

One class, and per tile either a hit (tp) or a miss (fp and fn): wF1 is then the share of tiles that are hits, and the
influence of a tile is its hit minus the mean.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest

from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.metrics import mean_iou, tile_counts, tile_mean_iou, wf1
from maestro_scale.evaluation.paired import (
    Component,
    Estimate,
    Run,
    difference,
    estimate,
    influences,
    load_runs,
    t_quantile,
    t_tail,
)
from maestro_scale.evaluation.report.summary import summarise
from maestro_scale.evaluation.results import EvalResult, EvaluationError, RunScore


def run(hits: str, seed: int = 0, keys: str = "", fold: int | None = None, variant: str = "") -> Run:
    """A run that hits the tiles of a "1"."""
    array = np.array([[[1], [0], [0]] if hit == "1" else [[0], [1], [1]] for hit in hits])
    return Run("wf1", seed, fold, TileCounts(tuple(keys or "abcdefghij"[: len(hits)]), array), variant)


def test_one_seed_gives_the_paired_interval_over_tiles():
    found = difference([run("1110")], [run("1000")])
    # Differences of the tiles 0, 1, 1, 0: variance 1/3, of the mean 1/12; t with 3 degrees of freedom is 3.1824.
    assert found.value == pytest.approx(0.5)
    assert found.tile.variance == pytest.approx(1 / 12)
    assert (found.seed.variance, found.inter.variance) == (0, 0)
    assert found.freedom == pytest.approx(3)
    assert found.high == pytest.approx(0.5 + 3.18245 * math.sqrt(1 / 12), abs=1e-5)
    assert found.low == pytest.approx(0.5 - 3.18245 * math.sqrt(1 / 12), abs=1e-5)
    assert (found.num_seeds, found.num_tiles, found.covers_seeds) == ((1, 1), 4, False)
    assert found.pairs_tiles


def test_paired_tiles_separate_what_two_intervals_cannot():
    rng = np.random.default_rng(0)
    target = rng.random((400, 5)) < 0.3
    predicted = target ^ (rng.random(target.shape) > 0.85)
    better = np.concatenate([target[:60], predicted[60:]])
    keys = tuple(map(str, range(400)))
    a, b = ([Run("wf1", 0, None, TileCounts(keys, tile_counts(p, target)))] for p in (better, predicted))
    found = difference(a, b)
    assert 0 < found.low < found.value < found.high
    assert estimate(a).low < estimate(b).high
    other_keys = TileCounts(tuple(f"other-{key}" for key in keys), b[0].counts.array)
    unpaired = difference(a, [dataclasses.replace(b[0], counts=other_keys)])
    assert unpaired.low < 0
    same = difference(b, b)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_two_seeds_add_the_variance_between_seeds():
    found = difference([run("0001", 3), run("0111", 8)], [run("1000", 8), run("1000", 3)])
    # Differences: -1, 0, 0, 1 with seed 3; -1, 1, 1, 1 with seed 8. Their means are 0 and 1/2.
    assert found.value == pytest.approx(0.25)
    assert found.seed.variance == pytest.approx(0.125 / 2)
    # Means of the tiles -1, 1/2, 1/2, 1: sum of squared deviations 2.25.
    assert found.tile.variance == pytest.approx(2.25 / 3 / 4)
    # Residuals ±1/4, eight of them, 3 degrees of freedom.
    assert found.inter.variance == pytest.approx(8 / 16 / 3 / 8)
    variance = 0.0625 + 0.1875 - 1 / 48
    assert found.total.variance == pytest.approx(variance)
    assert found.freedom == pytest.approx(variance**2 / (0.0625**2 + 0.1875**2 / 3 + (1 / 48) ** 2 / 3))
    assert (found.num_seeds, found.pairs_seeds, found.covers_seeds) == ((2,), True, True)


def test_the_variance_is_at_least_that_of_seeds_and_of_tiles():
    part = Component(4e-4, 8)
    for seed, tile in ((part, Component(1e-4, 2)), (Component(1e-4, 2), part)):
        found = Estimate(0.1, seed, tile, Component(3e-4, 16), (3,), 9, True, True)
        assert found.total == part


def test_seeds_that_move_alike_cancel_only_in_pairs():
    a = [run("1111", 0), run("1100", 1), run("1000", 2)]
    b = [run("0111", 0), run("0100", 1), run("0000", 2)]
    paired = difference(a, b)
    assert paired.value == pytest.approx(0.25)
    assert paired.seed.variance == 0
    assert paired.inter.variance == pytest.approx(0, abs=1e-15)
    other = [run("0111", 3), run("0100", 4), run("0000", 5)]
    unpaired = difference(a, other)
    assert unpaired.value == pytest.approx(0.25)
    # Each side has the scores x, x - 1/2, x - 3/4: variance 7/48, of a mean of three 7/144.
    assert unpaired.seed.variance == pytest.approx(2 * 7 / 144)
    assert unpaired.seed.freedom == pytest.approx(4)
    assert (unpaired.num_seeds, unpaired.pairs_seeds, unpaired.pairs_tiles) == ((3, 3), False, True)
    # The interactions of the sides do not cancel either: residuals of (-5 -1 3 3; 1 5 -3 -3; 4 -4 0 0) / 12, whose
    # squares sum to 5/6, with 6 degrees of freedom, on each side.
    assert unpaired.inter.variance == pytest.approx(2 * 5 / 6 / 6 / 12)


def test_seeds_that_were_scored_on_different_data_have_no_common_mean():
    old, new, unknown = (
        dataclasses.replace(run("1100", seed), data=data) for seed, data in enumerate(("old", "new", ""))
    )
    with pytest.raises(EvaluationError, match="different data"):
        estimate([old, new])
    assert estimate([new, unknown]).value == 0.5


def test_only_common_seeds_are_compared_where_there_are_two():
    a = [run("1111", 0), run("1111", 1), run("0000", 7)]
    b = [run("0011", 0), run("0011", 1), run("1111", 9)]
    assert difference(a, b).value == pytest.approx(0.5)
    assert difference(a, b).num_seeds == (2,)


def test_tiles_are_paired_by_key_whatever_their_order():
    a = [run("1110", 0, "abcd"), run("1110", 1, "abcd")]
    b = [run("0001", 0, "dcba"), run("0001", 1, "dcba")]  # a hit on a
    found = difference(a, b)
    assert found.pairs_tiles
    assert found.tile.variance == pytest.approx(1 / 12)
    others = difference(a, [run("0001", 0, "efgh"), run("0001", 1, "efgh")])
    assert not others.pairs_tiles
    assert others.tile.variance == pytest.approx(
        2 * 0.25 / 4
    )  # 1/4 is the variance of 1, 1, 1, 0 and of 0, 0, 0, 1
    other_data = [dataclasses.replace(r, data=digest) for r, digest in zip((*a, *b), "xxyy", strict=True)]
    assert not difference(other_data[:2], other_data[2:]).pairs_tiles
    assert difference(other_data[:2], b).pairs_tiles  # not known: an earlier revision
    repeated = difference(a, [run("0001", 0, "dcbb"), run("0001", 1, "dcbb")])
    assert not repeated.pairs_tiles


def test_folds_and_variants_are_averaged():
    runs = [
        run(hits, seed, keys, fold)
        for seed in (0, 1)
        for fold, hits, keys in ((1, "1100", "abcd"), (2, "1111", "efgh"))
    ]
    found = estimate(runs)
    assert found.value == pytest.approx(0.75)
    assert found.num_tiles == 8
    # Half of the influences ±1/2 on four tiles: variance 1/12, of the mean 1/48.
    assert found.tile.variance == pytest.approx(1 / 48)
    variants = [run("1100", seed, variant="x") for seed in (0, 1)] + [
        run("1111", seed, variant="y") for seed in (0, 1)
    ]
    assert estimate(variants).value == pytest.approx(0.75)
    assert estimate(variants).num_tiles == 4
    assert estimate(variants).tile.variance == pytest.approx(1 / 48)


def test_runs_that_form_no_table_are_refused():
    for runs in (
        [],
        [run("10"), run("10")],
        [run("10", 0, fold=1), run("10", 0, fold=2), run("10", 1, fold=1)],
    ):
        with pytest.raises(EvaluationError, match="not one per seed and fold"):
            estimate(runs)
    with pytest.raises(EvaluationError, match="scored on different tiles"):
        estimate([run("10", 0), run("10", 1, keys="xy")])
    with pytest.raises(EvaluationError, match="different metrics"):
        difference([run("10")], [Run("miou", 0, None, run("10").counts)])
    with pytest.raises(EvaluationError, match="no label of the test tiles counts"):
        estimate([Run("miou", 0, None, TileCounts(("a",), np.zeros((1, 3, 2), int)))])


def test_counts_that_do_not_give_the_score_of_their_result_are_refused(tmp_path):
    path = tmp_path / "results.json"
    counts = run("1110").counts
    result = EvalResult(
        "b", "wf1", "knn", 0.75, {"a": 0.75}, (0.5, 1.0), 4, counts=counts, datasets={"b": "d"}
    )
    result.write(path)
    (loaded,) = load_runs(path, EvalResult.load(path))
    assert (loaded.metric, loaded.seed, loaded.fold, loaded.data) == ("wf1", 0, None, "d")
    dataclasses.replace(result, value=0.7).write(path)
    with pytest.raises(EvaluationError, match=r"its counts give the score 0.75, not 0.7$"):
        load_runs(path, EvalResult.load(path))
    dataclasses.replace(result, metric="miou", counts=TileCounts(counts.keys, np.ones((4, 3)))).write(path)
    with pytest.raises(EvaluationError, match="are not those of the metric"):
        load_runs(path, EvalResult.load(path))
    # Sums of which only the total is a score: those of one tile would overflow.
    sums = np.array([[1.0, 0, 1e300, 0, 0, 0], [1.0, 0, -1e300, 0, 0, 0], [2.0, 0, 1.0, 0, 0, 0]])
    of_sums = TileCounts(("a", "b", "c"), sums)
    with pytest.raises(EvaluationError, match="counts of a tile are not those of the metric"):
        estimate([Run("rmse", 0, None, of_sums)])
    with pytest.raises(EvaluationError, match="too large for a score"):
        estimate([Run("rmse", 0, None, TileCounts(("a",), sums[:1]))])
    # A mean that names itself as its run.
    itself = (RunScore(0.75, (0.0, 1.0), 0, None, "results.json"),)
    dataclasses.replace(result, runs=itself, counts=None).write(path)
    with pytest.raises(EvaluationError, match="has no counts per tile"):
        load_runs(path, EvalResult.load(path))


def test_runs_that_another_evaluation_has_replaced_are_refused(tmp_path):
    def result(hits: str, seed: int, **changes) -> EvalResult:
        value = hits.count("1") / len(hits)
        made = EvalResult("b", "wf1", "knn", value, {"a": value}, (0.0, 1.0), 4, seeds=(seed,), encoder="a")
        return dataclasses.replace(made, counts=run(hits).counts, **changes)

    runs = [(f"seed_{seed}/results.json", result(hits, seed)) for seed, hits in ((0, "1110"), (1, "1100"))]
    for name, of_run in runs:
        of_run.write(tmp_path / name)
    path = tmp_path / "results.json"
    mean = summarise(runs)
    mean.write(path)
    assert [r.seed for r in load_runs(path, mean)] == [0, 1]
    # An evaluation of another encoder, or of the same one with another score, that was killed after its first seed.
    for replaced in (result("1110", 0, encoder="b"), result("1000", 0), result("1110", 2)):
        replaced.write(tmp_path / "seed_0" / "results.json")
        with pytest.raises(
            EvaluationError, match=r"seed_0/results.json is not the run that .* \(seed 0, score 0.75"
        ):
            load_runs(path, mean)


def test_influences_agree_with_the_bootstrap_variance_and_do_not_depend_on_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, (80, 4, 3)).astype(np.uint8)
    value, found = influences(tile_mean_iou, counts)
    assert value == pytest.approx(float(mean_iou(counts.sum(0, dtype=int)[:3])))
    drawn = counts[rng.integers(80, size=(3000, 80))].sum(1, dtype=int)
    assert math.sqrt(found.var() / 80) == pytest.approx(tile_mean_iou(drawn).std(), rel=0.06)
    monkeypatch.setattr("maestro_scale.evaluation.paired._CHUNK_BYTES", 1)
    np.testing.assert_array_equal(influences(tile_mean_iou, counts)[1], found)


def test_a_class_on_a_single_tile_has_a_finite_influence():
    counts = np.zeros((3, 3, 2), np.uint8)
    counts[:, 0, 0] = 10
    counts[0, 1, 1] = 10
    value, found = influences(tile_mean_iou, counts)
    assert value == 1
    assert found.tolist() == [0, 0, 0]


def test_quantiles_are_those_of_tables():
    assert t_quantile(0.975, 2) == pytest.approx(4.3027, abs=1e-4)
    assert t_quantile(0.975, math.inf) == pytest.approx(1.95996, abs=1e-5)
    assert t_tail(4.3027, 2) == pytest.approx(0.025, abs=1e-6)
    assert t_tail(1.95996, math.inf) == pytest.approx(0.025, abs=1e-6)


def simulated(rng: np.random.Generator, num_seeds: int, num_tiles: int) -> tuple[list[Run], list[Run]]:
    """Two sets of runs on the same tiles: logits of a right decision on 4 classes vary with the seed, the tile, and
    the seed on the tile. Tiles favour one side or the other."""
    truth = rng.random((num_tiles, 4)) < 0.3
    hard, favours = rng.normal(size=(2, num_tiles, 1))
    keys = tuple(map(str, range(num_tiles)))
    sides = []
    for sign in (1, -1):
        runs = []
        for seed in range(num_seeds):
            logits = 1 + sign * (0.15 + 0.5 * favours) + hard + 0.12 * rng.normal()
            logits = logits + 0.5 * rng.normal(size=truth.shape)
            predicted = truth ^ (rng.random(truth.shape) > 1 / (1 + np.exp(-logits)))
            counts = np.stack([predicted & truth, predicted & ~truth, ~predicted & truth], axis=1)
            runs.append(Run("wf1", seed, None, TileCounts(keys, counts.astype(np.uint8))))
        sides.append(runs)
    return sides[0], sides[1]


@functools.cache
def true_difference() -> float:
    """Of the mean scores of both sides, from many seeds and tiles."""

    def score(runs: list[Run]) -> float:
        return float(np.mean([wf1(r.counts.array.sum(0, dtype=int)) for r in runs]))

    drawn = [simulated(np.random.default_rng([1, draw]), 8, 2000) for draw in range(30)]
    return float(np.mean([score(a) - score(b) for a, b in drawn]))


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_the_interval_covers_the_true_difference_in_95_percent(num_seeds):
    rng = np.random.default_rng(num_seeds)
    found = [difference(*simulated(rng, num_seeds, 150)) for _ in range(300)]
    covered = np.mean([f.low <= true_difference() <= f.high for f in found])
    # 300 draws: standard error 1.3 %. More scenarios and draws: benchmarks/study_coverage.py.
    assert 0.91 <= covered <= 0.985

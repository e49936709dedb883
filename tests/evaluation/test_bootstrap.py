"""Bootstrap intervals."""

import numpy as np
import pytest

from maestro_scale.evaluation import bootstrap
from maestro_scale.evaluation.bootstrap import bootstrap_interval
from maestro_scale.evaluation.metrics import MultilabelCounts, confusion, mean_iou, tile_counts, wf1


def predictions(accuracy, tiles=200, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.random((tiles, 5)) < 0.3
    return target ^ (rng.random(target.shape) > accuracy), target


def test_the_interval_contains_the_score_and_narrows_with_tiles():
    widths = []
    for tiles in (100, 1600):
        predicted, target = predictions(0.9, tiles)
        low, high = bootstrap_interval(wf1, tile_counts(predicted, target), resamples=300)
        assert low < MultilabelCounts.of(predicted, target).wf1() < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)


def test_it_agrees_with_resampling_one_by_one():
    counts = tile_counts(*predictions(0.8, tiles=60))
    rng = np.random.default_rng(1)
    drawn = [MultilabelCounts.from_array(counts[rng.integers(60, size=60)].sum(0)).wf1() for _ in range(2000)]
    expected = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_interval(wf1, counts, 2000), expected, atol=0.012)


def test_it_is_reproducible_and_does_not_depend_on_chunks(monkeypatch):
    counts = tile_counts(*predictions(0.8, tiles=50))
    whole = bootstrap_interval(wf1, counts, 100, seed=3)
    monkeypatch.setattr(bootstrap, "_CHUNK_CELLS", 350)
    assert bootstrap_interval(wf1, counts, 100, seed=3) == whole
    assert bootstrap_interval(wf1, counts, 100, seed=4) != whole


def test_confusions_of_tiles_can_be_drawn_too():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, (40, 8, 8))
    predicted = np.where(rng.random(target.shape) < 0.8, target, 0)
    counts = np.stack([confusion(p, t, 3) for p, t in zip(predicted, target, strict=True)])
    low, high = bootstrap_interval(mean_iou, counts, 100)
    assert low < mean_iou(counts.sum(0)) < high


def test_no_tiles_is_an_error():
    with pytest.raises(ValueError, match="over no tiles"):
        bootstrap_interval(wf1, np.zeros((0, 3, 2)))


def test_a_tile_without_a_counted_pixel_leaves_the_interval_defined():
    counts = np.zeros((3, 4, 4), np.int64)
    counts[0] = np.diag([5, 5, 5, 5]) + 1
    counts[1] = np.diag([9, 1, 4, 3]) + 2
    low, high = bootstrap_interval(mean_iou, counts, 500)
    assert 0 < low < high < 1
    with pytest.raises(ValueError, match="without a score"):
        bootstrap_interval(mean_iou, counts[2:], 50)


def test_a_resample_has_as_many_tiles_as_there_are():
    # Every tile counts 1, so every resample sums to 7, and any interval is a point.
    counts = np.ones((7, 1))
    assert bootstrap_interval(lambda sums: sums[..., 0], counts, 200) == (7.0, 7.0)


def test_every_tile_is_drawn_once_per_resample_on_average():
    # Each of 5 tiles is drawn Binomial(5, 1 / 5) times: mean 1; over 4,000 resamples its standard error is 0.014.
    drawn = []

    def note(sums: np.ndarray) -> np.ndarray:
        drawn.append(sums)
        return sums[..., 0]

    bootstrap_interval(note, np.eye(5), 4000)
    (sums,) = drawn
    assert sums.shape == (4000, 5)
    assert (sums.sum(1) == 5).all()
    np.testing.assert_allclose(sums.mean(0), 1, atol=0.06)
    np.testing.assert_allclose((sums == 0).mean(0), 0.8**5, atol=0.03)


def test_resamples_are_drawn_from_seed_and_number():
    # Three resamples of four tiles under seed 3, as they were first drawn; saved intervals depend on them.
    weights = next(bootstrap._weights(4, 3, 3))
    assert weights.tolist() == [[1, 1, 0, 2], [0, 0, 2, 2], [0, 1, 1, 2]]


def test_the_interval_leaves_out_the_same_share_at_both_ends():
    # Of the scores 0, 1, …, 100 the level 0.9 leaves out 5 at each end.
    assert bootstrap._interval(np.arange(101.0), 0.9) == (pytest.approx(5.0), pytest.approx(95.0))
    scores = np.array([np.nan, 1.0, 3.0])
    assert bootstrap._interval(scores, 0.5) == (pytest.approx(1.5), pytest.approx(2.5))


@pytest.mark.parametrize(("level", "resamples"), [(0.0, 10), (1.0, 10), (0.95, 0)])
def test_levels_and_numbers_that_make_no_interval_are_refused(level, resamples):
    with pytest.raises(ValueError, match="must lie within"):
        bootstrap_interval(wf1, np.ones((3, 3, 2)), resamples, level=level)
    assert len(bootstrap_interval(wf1, np.ones((3, 3, 2)), 1, level=0.5)) == 2


def total(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(len(sums), -1).sum(1)


def test_defaults_are_a_thousand_resamples_of_seed_zero_at_95_percent():
    counts = np.random.default_rng(0).random((20, 2))
    assert bootstrap_interval(total, counts) == bootstrap_interval(total, counts, 1000, 0, 0.95)
    assert bootstrap_interval(total, counts) != bootstrap_interval(total, counts, 999, 0, 0.95)
    assert bootstrap_interval(total, counts) != bootstrap_interval(total, counts, 1001, 0, 0.95)
    assert bootstrap_interval(total, counts) != bootstrap_interval(total, counts, 1000, 1, 0.95)


def test_resamples_of_many_tiles_are_drawn_one_at_a_time(monkeypatch):
    # More tiles than cells of a chunk: still one resample per chunk.
    monkeypatch.setattr(bootstrap, "_CHUNK_CELLS", 3)
    chunks = list(bootstrap._weights(4, 3, 3))
    assert [c.shape for c in chunks] == [(1, 4)] * 3
    assert [c.tolist()[0] for c in chunks] == [[1, 1, 0, 2], [0, 0, 2, 2], [0, 1, 1, 2]]
    # 8 cells: two resamples of four tiles, then one.
    monkeypatch.setattr(bootstrap, "_CHUNK_CELLS", 8)
    assert [c.shape for c in bootstrap._weights(4, 3, 3)] == [(2, 4), (1, 4)]
    assert next(bootstrap._weights(4, 3, 3)).dtype == np.float64

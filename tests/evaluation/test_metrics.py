"""Metrics against scikit-learn; counts do not depend on how the samples are split."""

import dataclasses

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from maestro_scale.evaluation.metrics import (
    MultilabelCounts,
    average_precision,
    best_index,
    confusion,
    f1,
    iou,
    mean_iou,
    segmentation_scores,
    tile_counts,
    wf1,
)
from maestro_scale.evaluation.results import EvaluationError

QUICK = settings(max_examples=40, deadline=None)
BITS = npst.arrays(
    bool, st.tuples(st.just(2), st.integers(1, 12), st.integers(2, 5))
)  # two: one is binary to scikit-learn


def labels(shape):
    return npst.arrays(np.int64, shape, elements=st.integers(0, 5))


@QUICK
@given(BITS, st.sampled_from([0.0, 1.0]))
def test_multilabel_scores_equal_scikit_learn(bits, zero_division):
    predicted, target = bits
    counts = MultilabelCounts.of(predicted, target)

    def reference_f1(average):
        return reference.f1_score(target, predicted, average=average, zero_division=zero_division)

    matrices = reference.multilabel_confusion_matrix(target, predicted)
    np.testing.assert_array_equal(counts.as_array().T, matrices[:, [1, 0, 1], [1, 1, 0]])
    np.testing.assert_allclose(counts.f1(zero_division), reference_f1(None), rtol=1e-12)
    assert counts.wf1(zero_division) == pytest.approx(reference_f1("weighted"))
    assert counts.macro_f1(zero_division) == pytest.approx(reference_f1("macro"))


@QUICK
@given(BITS, st.integers(0, 12))
def test_counts_do_not_depend_on_the_split_into_batches(bits, cut):
    predicted, target = bits
    parts = [MultilabelCounts.of(predicted[s], target[s]) for s in (slice(cut), slice(cut, None))]
    whole = MultilabelCounts.of(predicted, target)
    np.testing.assert_array_equal((parts[0] + parts[1]).as_array(), whole.as_array())
    np.testing.assert_array_equal((MultilabelCounts.zeros(target.shape[1]) + whole).support, target.sum(0))
    assert whole.tp.dtype == np.int64


@QUICK
@given(
    st.integers(1, 30).flatmap(lambda n: st.tuples(labels(n), labels(n))),
    st.sets(st.integers(0, 5), max_size=4),
)
def test_mean_iou_equals_scikit_learn_on_the_pixels_that_count(pair, ignored):
    predicted, target = pair
    keep = ~np.isin(target, list(ignored))
    matrix = confusion(predicted, target, 6, ignored)
    np.testing.assert_array_equal(
        matrix,
        reference.confusion_matrix(target[keep], predicted[keep], labels=range(6)) if keep.any() else 0,
    )
    present = np.unique(target[keep])
    if not present.size:
        assert np.isnan(mean_iou(matrix))
        return
    expected = reference.jaccard_score(
        target[keep], predicted[keep], labels=present, average=None, zero_division=0
    )
    np.testing.assert_allclose(iou(matrix)[present], expected)
    assert np.isnan(np.delete(iou(matrix), present)).all()
    assert mean_iou(matrix) == pytest.approx(expected.mean())


def test_an_ignored_value_may_lie_outside_the_classes():
    matrix = confusion(np.array([0, 1, 1]), np.array([0, 1, 255]), 2, ignored=(255,))
    np.testing.assert_array_equal(matrix, np.eye(2))
    with pytest.raises(ValueError, match="target class 255 is outside the 2 classes 0-1"):
        confusion(np.array([0]), np.array([255]), 2)


def test_scores_of_many_resamples_at_once_equal_those_one_by_one():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (7, 3, 4))
    np.testing.assert_allclose(wf1(counts), [MultilabelCounts.from_array(c).wf1() for c in counts])


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="apply a threshold"):
        tile_counts(np.full((2, 3), 0.7), np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        tile_counts(np.ones((2, 3), bool), np.ones((3, 2), bool))


def test_average_precision_is_undefined_without_a_positive():
    scores = np.array([[0.9, 0.1, 0.4], [0.8, 0.7, 0.3], [0.2, 0.6, 0.2]])
    target = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    found = average_precision(scores, target)
    np.testing.assert_allclose(found[:2], [(1 + 2 / 3) / 2, 1.0])
    assert np.isnan(found[2])


@given(st.integers(0, 2**32 - 1))
def test_other_segmentation_scores_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    target, answer = rng.integers(0, 5, 60), rng.integers(0, 4, 60)  # 4 is "other", class 3 sometimes absent
    target[target == 3] = rng.choice([0, 3])
    if not (target < 4).any():
        target[0] = 0
    scores = segmentation_scores(confusion(answer, target, 5)[:, :4])
    kept = target < 4
    present = np.unique(target[kept])
    jaccard = reference.jaccard_score(target, answer, labels=present, average=None)
    assert scores["miou_with_other"] == pytest.approx(jaccard.mean())
    kept_jaccard = reference.jaccard_score(target[kept], answer[kept], labels=present, average=None)
    assert scores["miou_absent_as_zero"] == pytest.approx(kept_jaccard.sum() / 4)
    assert scores["pixel_accuracy"] == pytest.approx(reference.accuracy_score(target[kept], answer[kept]))
    f1_scores = reference.f1_score(target[kept], answer[kept], labels=present, average="macro")
    assert scores["mean_f1"] == pytest.approx(f1_scores)


def test_the_best_is_the_first_of_equals_and_there_is_none_without_a_score():
    assert best_index([0.2, 0.5, 0.5]) == 1
    with pytest.raises(EvaluationError, match="no label of the test split counts"):
        best_index([0.2, float("nan")], "test")


def test_segmentation_scores_worked_out_by_hand():
    # Rows are targets. Class 0: 3 hits of 4 and answered 5 times; class 1: 2 of 4, answered 3; class 2: in no target.
    # Two ignored pixels are answered 0 and 2.
    counts = np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0], [1, 0, 1]])
    assert segmentation_scores(counts) == {
        "pixel_accuracy": pytest.approx(5 / 8),
        "mean_f1": pytest.approx((6 / 9 + 4 / 7) / 2),
        "miou_absent_as_zero": pytest.approx((3 / 6 + 2 / 5 + 0) / 3),
        "miou_with_other": pytest.approx((3 / 7 + 2 / 5) / 2),
    }
    np.testing.assert_allclose(iou(counts[:3]), [3 / 6, 2 / 5, np.nan])
    assert mean_iou(counts[:3]) == pytest.approx((3 / 6 + 2 / 5) / 2)


def test_multilabel_scores_worked_out_by_hand():
    # a: 2 hits, 1 false, 1 missed: 4 / 6 over 3 labels. b: 0 of 1. c: neither there nor answered.
    counts = MultilabelCounts.from_array([[2, 0, 0], [1, 0, 0], [1, 1, 0]])
    assert counts.support.tolist() == [3, 1, 0]
    np.testing.assert_allclose(counts.f1(), [4 / 6, 0, 0])
    assert counts.wf1() == pytest.approx((3 * 4 / 6 + 1 * 0) / 4)
    assert counts.macro_f1() == pytest.approx((4 / 6 + 0 + 0) / 3)
    assert counts.macro_f1(zero_division=np.nan) == pytest.approx((4 / 6 + 0) / 2)
    # Of no label at all wF1 is the plain mean.
    assert MultilabelCounts.from_array([[0, 0], [1, 0], [0, 0]]).wf1(zero_division=1.0) == 0.5


def test_the_first_value_beyond_the_classes_is_refused():
    assert confusion(np.array([2, 0]), np.array([0, 2]), 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    for value in (3, -1):
        with pytest.raises(ValueError, match=f"predicted class {value} is outside the 3 classes 0-2"):
            confusion(np.array([value]), np.array([0]), 3)


def test_shapes_and_types_of_tile_counts():
    with pytest.raises(ValueError, match=r"must both be \(samples, classes\)"):
        tile_counts(np.ones(3, bool), np.ones(3, bool))
    for predicted, target in (
        (np.ones((1, 2)), np.ones((1, 2), bool)),
        (np.ones((1, 2), bool), np.ones((1, 2))),
    ):
        with pytest.raises(ValueError, match="apply a threshold"):
            tile_counts(predicted, target)
    counts = tile_counts(np.array([[True, True, False, False]]), np.array([[True, False, True, False]]))
    assert counts.astype(int).tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]


def test_scores_without_a_division_are_zero_by_default():
    # No class is present: the plain mean of 2 * 0 / (0 + 1) and of an undefined one.
    counts = np.array([[0, 0], [1, 0], [0, 0]])
    assert f1(counts).tolist() == [0.0, 0.0]
    assert wf1(counts) == 0.0
    assert MultilabelCounts.from_array(counts).f1().tolist() == [0.0, 0.0]
    assert (MultilabelCounts.from_array(counts).wf1(), MultilabelCounts.from_array(counts).macro_f1()) == (
        0.0,
        0.0,
    )
    undefined = MultilabelCounts.zeros(2)
    assert np.isnan(undefined.macro_f1(zero_division=np.nan))
    assert undefined.as_array().tolist() == [[0, 0]] * 3
    # A class without support has weight 0, also if its score is NaN.
    assert wf1(np.array([[1, 0], [0, 0], [1, 0]]), np.nan) == pytest.approx(2 / 3)


def test_a_single_labelled_sample_is_the_whole_weight():
    # Support 1 and 0: the score of the first class, 2 / 3.
    assert wf1(np.array([[1, 0], [1, 3], [0, 0]])) == pytest.approx(2 / 3)


def test_confusions_are_counted_by_target_row():
    matrix = confusion(np.array([[0, 1], [2, 2]]), np.array([[0, 0], [2, 1]]), 3)
    assert (matrix.tolist(), matrix.dtype) == ([[1, 1, 0], [0, 0, 1], [0, 0, 1]], np.int64)
    with pytest.raises(ValueError, match="they must agree"):
        confusion(np.array([0]), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match=r"target class -1 is outside the 2 classes 0-1 \(ignored: \[7\]\)"):
        confusion(np.array([0]), np.array([-1]), 2, ignored=(7,))
    with pytest.raises(ValueError, match=r"target class 5 is outside .* \(ignored: \[7, 9\]\)"):
        confusion(np.array([0, 0]), np.array([5, 6]), 2, ignored=(9, 7))
    with pytest.raises(ValueError, match=r"ignored: none"):
        confusion(np.array([0]), np.array([2]), 2)


def test_iou_of_many_confusions_at_once():
    first, second = np.array([[1, 1], [0, 0]]), np.array([[0, 2], [1, 3]])
    scores = iou(np.stack([first, second]))
    np.testing.assert_allclose(scores, [[1 / 2, np.nan], [0.0, 3 / 6]])
    np.testing.assert_allclose(mean_iou(np.stack([first, second])), [1 / 2, 1 / 4])
    # One pixel alone counts.
    assert mean_iou(np.array([[1, 0], [0, 0]])) == 1.0
    assert np.isnan(mean_iou(np.zeros((2, 2))))
    np.testing.assert_allclose(mean_iou(np.stack([first, second, first])), [1 / 2, 1 / 4, 1 / 2])


def test_undefined_scores_are_not_divided():
    with np.errstate(all="raise"):
        assert np.isnan(mean_iou(np.zeros((2, 2))))
        assert wf1(np.zeros((3, 2))) == 0.0


def test_a_class_of_one_pixel_is_present():
    # Class 0: 1 hit of 1, answered twice; class 1: 2 of 3, answered twice.
    scores = segmentation_scores(np.array([[1, 0], [1, 2], [0, 0]]))
    assert scores["mean_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["miou_with_other"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_average_precision_needs_a_score_for_every_class():
    with pytest.raises(ValueError, match="zip"):
        average_precision(np.ones((4, 2)), np.ones((4, 1)))


def test_average_precision_of_equal_scores():
    # Two of four are positive and all scores are equal: one step, precision 1 / 2.
    assert average_precision(np.ones((4, 1)), np.array([[1], [0], [1], [0]])).tolist() == [0.5]


def test_the_best_of_one_candidate():
    assert best_index([0.0]) == 0
    with pytest.raises(EvaluationError, match="validation split counts"):
        best_index([float("nan")])


def test_counts_are_values():
    counts = MultilabelCounts.zeros(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        counts.tp = np.ones(2)

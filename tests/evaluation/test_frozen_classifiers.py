"""kNN and linear probe per tile, against their definitions."""

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from testkit.labelled import clusters, data, score

from maestro_scale.evaluation.features.labelled_features import LabelledFeatures
from maestro_scale.evaluation.probes.knn import knn
from maestro_scale.evaluation.probes.linear import linear_probe


def test_the_probe_is_logistic_regression():
    train, validation, test = data(150, seed=1), data(50, seed=2), data(40, seed=3)
    fit = linear_probe(train, validation, test.features, l2=[0.01])
    mean, scale = train.features.mean(0), train.features.std(0)
    for c in range(train.labels.shape[1]):
        model = LogisticRegression(C=1 / (0.01 * 150), tol=1e-10, max_iter=5000)
        model.fit((train.features - mean) / scale, train.labels[:, c])
        expected = model.predict_proba((test.features - mean) / scale)[:, 1]
        np.testing.assert_allclose(fit.scores[:, c], expected, atol=1e-3)


def test_the_probe_is_deterministic_fast_and_chooses_on_validation():
    train, validation, test = (data(n, 256, 15, seed) for n, seed in ((400, 1), (120, 2), (200, 3)))
    start = time.perf_counter()
    first = linear_probe(train, validation, test.features)
    assert time.perf_counter() - start < 10  # a second alone; room for a busy machine
    second = linear_probe(train, validation, test.features)
    np.testing.assert_array_equal(first.scores, second.scores)
    each = {v: linear_probe(train, validation, test.features, [v]).validation.wf1() for v in (1.0, 0.0001)}
    assert first.validation.wf1() >= max(each.values()) - 1e-9
    assert score(first, test) > 0.6


def test_the_probe_accepts_absent_classes_and_constant_features():
    train, validation, test = data(60, seed=1), data(30, seed=2), data(20, seed=3)
    train.labels[:, 0] = False
    train.labels[:, 1] = True
    train.features[:, 5] = 3.0
    test.features[:, 5] = 1e6
    fit = linear_probe(train, validation, test.features)
    assert np.isfinite(fit.scores).all()
    assert not fit.predicted[:, 0].any()
    assert fit.predicted[:, 1].all()


@pytest.mark.parametrize("classify", [knn, linear_probe])
def test_wrong_features_are_named(classify):
    train, validation = data(20, seed=1), data(10, seed=2)
    with pytest.raises(ValueError, match="differ in width"):
        classify(train, validation, np.zeros((3, 31), np.float32))
    bad = np.zeros((3, 32), np.float32)
    bad[2, 4] = np.nan
    with pytest.raises(ValueError, match="sample 2 are not finite"):
        classify(train, validation, bad)
    with pytest.raises(ValueError, match="there is no sample to fit on"):
        LabelledFeatures(np.zeros((0, 4)), np.zeros((0, 2), bool))


def test_of_penalties_with_equal_scores_the_probe_takes_the_strongest():
    train, validation = (
        LabelledFeatures(np.eye(8, dtype=np.float32)[:n], np.ones((n, 1), bool)) for n in (8, 4)
    )
    fit = linear_probe(train, validation, train.features, l2=(0.01, 1.0, 0.1))
    assert fit.validation.wf1() == 1.0
    assert fit.chosen == {"l2": 1.0}


def test_a_class_with_a_probability_of_one_half_is_not_predicted():
    # Two training samples in the same direction, one of each label: their share is 1/2 for any query.
    features, labels = np.ones((2, 3), np.float32), np.array([[True], [False]])
    train = LabelledFeatures(features, labels)
    fit = knn(train, train, features, neighbours=(2,), temperatures=(0.1,))
    assert fit.scores.tolist() == [[0.5], [0.5]]
    assert fit.predicted.tolist() == [[False], [False]]
    assert (fit.validation.tp.tolist(), fit.validation.fp.tolist(), fit.validation.fn.tolist()) == (
        [0],
        [0],
        [1],
    )
    # Features that never move say nothing: the log-odds of one in two are 0.
    fit = linear_probe(train, train, features, l2=(0.1,))
    assert fit.scores.tolist() == [[0.5], [0.5]]
    assert fit.predicted.tolist() == [[False], [False]]
    assert fit.validation.fn.tolist() == [1]


@pytest.mark.parametrize("l2", [(), (0.0,), (0.1, 0.0), (0.1, -1.0)])
def test_penalties_without_an_optimum_are_refused(l2):
    train = clusters(4, 1)
    with pytest.raises(ValueError, match="must contain values above 0 only"):
        linear_probe(train, train, train.features, l2=l2)

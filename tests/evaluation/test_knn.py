"""Weighted kNN per tile, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from testkit.labelled import clusters, data, score

from maestro_scale.evaluation.features.labelled_features import LabelledFeatures
from maestro_scale.evaluation.probes.decision import THRESHOLD
from maestro_scale.evaluation.probes.knn import NEIGHBOURS, TEMPERATURES, knn


def test_knn_finds_clusters_of_features_of_any_length():
    test = clusters(80, 3)
    fit = knn(clusters(200, 1), clusters(60, 2), test.features)
    assert score(fit, test) > 0.98
    assert fit.validation.wf1() > 0.98
    assert set(fit.chosen) == {"k", "temperature"}


def test_knn_scores_equal_the_formula():
    train, validation, test = data(50, seed=1), data(20, seed=2), data(10, seed=3)
    fit = knn(train, validation, test.features, neighbours=[7], temperatures=[0.1])
    distance, nearest = (
        NearestNeighbors(n_neighbors=7, metric="cosine").fit(train.features).kneighbors(test.features)
    )
    weights = np.exp((1 - distance) / 0.1)[..., None]
    expected = (weights * train.labels[nearest]).sum(1) / weights.sum(1)
    np.testing.assert_allclose(fit.scores, expected, atol=1e-4)
    np.testing.assert_array_equal(fit.predicted, fit.scores > 0.5)


def test_knn_with_fewer_samples_than_neighbours_uses_them_all():
    fit = knn(clusters(4, 1), clusters(10, 2), clusters(10, 3).features, neighbours=[20])
    assert fit.chosen["k"] == 4


def test_hyperparameters_are_chosen_on_validation_not_on_test():
    train, validation, test = data(120, seed=1), data(80, seed=2), data(60, seed=3)
    grid = [(k, t) for k in (1, 5, 40) for t in (0.05, 0.5)]
    fits = {(k, t): knn(train, validation, test.features, [k], [t]) for k, t in grid}
    best = max(fits.values(), key=lambda f: f.validation.wf1())
    chosen = knn(train, validation, test.features, (1, 5, 40), (0.05, 0.5))
    assert chosen.chosen == best.chosen
    np.testing.assert_array_equal(chosen.predicted, best.predicted)


def test_of_candidates_with_equal_scores_knn_takes_the_first():
    # One label for all: every k and temperature is right everywhere. k ascends whatever the order it is given in.
    train, validation = (
        LabelledFeatures(np.eye(8, dtype=np.float32)[:n], np.ones((n, 1), bool)) for n in (8, 4)
    )
    fit = knn(train, validation, train.features, neighbours=(5, 2, 3), temperatures=(0.2, 0.07))
    assert fit.validation.wf1() == 1.0
    assert fit.chosen == {"k": 2, "temperature": 0.2}


def test_knn_weights_worked_out_by_hand():
    # Similarities to the query (1, 0): 1, 0 and -1; at temperature 1 the weights are e, 1 and 1/e.
    train = LabelledFeatures(
        np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], np.float32),
        np.array([[True, False], [False, True], [True, False]]),
    )
    query = np.array([[5.0, 0.0]], np.float32)
    fit = knn(train, train, query, neighbours=(3,), temperatures=(1.0,))
    # e + 1 + 1/e = 4.086161; (e + 1/e) / 4.086161 = 0.755272 and 1 / 4.086161 = 0.244728.
    np.testing.assert_allclose(fit.scores, [[0.755272, 0.244728]], atol=1e-6)
    fit = knn(train, train, query, neighbours=(2,), temperatures=(0.5,))
    # e**2 = 7.389056; 7.389056 / 8.389056 = 0.880797.
    np.testing.assert_allclose(fit.scores, [[0.880797, 0.119203]], atol=1e-6)


def test_the_candidates_of_the_protocol():
    # Results name the chosen k and temperature; another grid would be another protocol.
    assert NEIGHBOURS == (5, 10, 20, 50)
    assert TEMPERATURES == (0.03, 0.07, 0.2)
    assert THRESHOLD == 0.5


@pytest.mark.parametrize(("neighbours", "temperatures"), [((), (0.1,)), ((5,), ())])
def test_no_candidate_is_refused(neighbours, temperatures):
    train = clusters(4, 1)
    with pytest.raises(ValueError, match="at least one candidate for k and for the temperature"):
        knn(train, train, train.features, neighbours, temperatures)


def test_no_query_has_no_scores():
    train = clusters(4, 1)
    fit = knn(train, train, train.features[:0], (2,), (0.1,))
    assert fit.scores.shape == fit.predicted.shape == (0, 3)


def test_a_share_of_one_half_is_not_predicted():
    # Two training samples in the same direction, one of each label: their share is 1/2 for any query.
    train = LabelledFeatures(np.ones((2, 3), np.float32), np.array([[True], [False]]))
    fit = knn(train, train, train.features, (2,), (0.1,))
    assert (fit.scores.tolist(), fit.predicted.tolist()) == ([[0.5], [0.5]], [[False], [False]])
    assert fit.validation.fn.tolist() == [1]


def test_features_are_compared_by_direction_in_chunks_of_queries(monkeypatch):
    train, validation, test = data(50, seed=1), data(20, seed=2), data(10, seed=3)
    whole = knn(train, validation, test.features)
    longer = LabelledFeatures(train.features * 3, train.labels)
    monkeypatch.setattr("maestro_scale.evaluation.probes.knn._CHUNK", 3)
    parts = knn(longer, validation, test.features * 7)
    assert parts.chosen == whole.chosen
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-5)

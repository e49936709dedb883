"""Synthetic labelled features for the tests of the frozen classifiers."""

from __future__ import annotations

import numpy as np

from maestro_scale.evaluation.features.labelled_features import LabelledFeatures
from maestro_scale.evaluation.metrics import MultilabelCounts


def data(num, num_features=32, num_classes=4, seed=0, noise=0.3):
    """Labels that follow from directions in feature space; every call shares the directions."""
    directions = np.random.default_rng(99).normal(size=(num_features, num_classes))
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, num_features)).astype(np.float32)
    scores = features @ directions / np.sqrt(num_features) + noise * rng.normal(size=(num, num_classes))
    return LabelledFeatures(features, scores > 0.3)


def clusters(num, seed):
    """Each sample lies near one of six directions, at any length; its labels are the cluster's."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(7)
    centres, labels = shared.normal(size=(6, 16)), shared.random((6, 3)) < 0.4
    which = rng.integers(6, size=num)
    features = (centres[which] + 0.2 * rng.normal(size=(num, 16))) * rng.uniform(0.1, 10, (num, 1))
    return LabelledFeatures(features.astype(np.float32), labels[which])


def score(fit, test):
    return MultilabelCounts.of(fit.predicted, test.labels).wf1()

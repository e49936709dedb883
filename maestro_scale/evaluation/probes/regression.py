"""Regression of one number per tile on frozen features: weighted nearest neighbours and ridge regression.

Shapes: N samples, F features. Labels are (N,) float, NaN where missing; those samples are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from maestro_scale.evaluation.features.labelled_features import check_features
from maestro_scale.evaluation.features.on_device import to_device
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.probes.knn import (
    NEIGHBOURS,
    TEMPERATURES,
    nearest_neighbours,
    neighbour_mean,
    unit_vectors,
)
from maestro_scale.evaluation.probes.linear import feature_scale, standardised
from maestro_scale.evaluation.regression_metrics import rmse, tile_sums
from maestro_scale.evaluation.results import EvaluationError

CPU = torch.device("cpu")

L2 = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001, 0.00001)


@dataclass(frozen=True)
class NumberFeatures:
    """``features`` (N, F) and ``labels`` (N,) of the samples that have a label; built by :meth:`of`."""

    features: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray, split: str) -> NumberFeatures:
        """Those of a split. EvaluationError if no sample has a label, ValueError if a feature is not finite."""
        rows = np.flatnonzero(~np.isnan(labels))
        if not len(rows):
            raise EvaluationError(f"every label of the {split} split is missing: use another split")
        check_features(features)
        return cls(features[rows], labels[rows])


@dataclass(frozen=True)
class NumberResult:
    """``predicted`` (N,) float64 of the test samples; ``chosen``: hyperparameters selected on validation."""

    predicted: np.ndarray
    chosen: dict[str, float]


def knn_regression(
    train: NumberFeatures,
    validation: NumberFeatures,
    test_features: np.ndarray,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperatures: Sequence[float] = TEMPERATURES,
    device: torch.device = CPU,
) -> NumberResult:
    """The mean of the neighbours' numbers, weighted by exp(similarity / temperature); k and temperature are those with
    the lowest validation RMSE, the first one of a tie."""
    check_features(test_features)
    bank = unit_vectors(train.features, device)
    centre = float(train.labels.mean(dtype=np.float64))
    numbers = to_device((train.labels - centre)[:, None].astype(np.float32), device)
    candidates = [
        (k, t) for k in sorted({min(k, len(train.labels)) for k in neighbours}) for t in temperatures
    ]

    def predict(features: np.ndarray, settings: Sequence[tuple[int, float]]) -> list[np.ndarray]:
        most = max(k for k, _ in settings)
        similarity, nearest = nearest_neighbours(unit_vectors(features, device), bank, most)
        found = [neighbour_mean(similarity, nearest, numbers, k, t)[:, 0] for k, t in settings]
        return [values.cpu().numpy().astype(np.float64) + centre for values in found]

    scores = [_rmse(p, validation.labels) for p in predict(validation.features, candidates)]
    best = candidates[best_index(scores, sign=-1)]
    return NumberResult(predict(test_features, [best])[0], {"k": best[0], "temperature": best[1]})


def ridge(
    train: NumberFeatures,
    validation: NumberFeatures,
    test_features: np.ndarray,
    l2: Sequence[float] = L2,
    device: torch.device = CPU,
) -> NumberResult:
    """Ridge regression in float64 on standardised features and labels; the strength is that with the lowest validation
    RMSE, the stronger one of a tie.

    Minimises mean((x·w - y)²) + l2·|w|², by one eigendecomposition of the features' covariance for all strengths.
    """
    check_features(test_features)
    mean, scale = feature_scale(train.features)
    centre = float(train.labels.mean(dtype=np.float64))
    x = standardised(train.features, mean, scale, device)
    y = to_device(train.labels.astype(np.float64) - centre, device)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    projected = vectors.T @ (x.T @ y / len(x))
    strengths = sorted(set(l2), reverse=True)
    weights = torch.stack([vectors @ (projected / (values.clamp_min(0) + s)) for s in strengths], dim=1)

    def predict(features: np.ndarray, columns: torch.Tensor) -> np.ndarray:
        return (standardised(features, mean, scale, device) @ columns).cpu().numpy() + centre

    found = predict(validation.features, weights)
    best = best_index([_rmse(p, validation.labels) for p in found.T], sign=-1)
    return NumberResult(predict(test_features, weights[:, best : best + 1])[:, 0], {"l2": strengths[best]})


def _rmse(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(rmse(tile_sums(predicted, labels).sum(axis=0)))

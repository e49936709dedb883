"""Linear probe on frozen features: one logistic regression per class.

Full-batch L-BFGS in float64 from zero, so nothing is drawn and no learning rate is to be tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maestro_scale.evaluation.features.labelled_features import (
    ClassifierResult,
    LabelledFeatures,
    check_splits,
)
from maestro_scale.evaluation.metrics import MultilabelCounts

L2 = (1.0, 0.1, 0.01, 0.001, 0.0001)
THRESHOLD = 0.5  # by protocol: sigmoid > 0.5

_MAX_ITERATIONS = 200
_TOLERANCE = 1e-6  # largest gradient entry of the mean loss


def linear_probe(
    train: LabelledFeatures, validation: LabelledFeatures, test_features: np.ndarray, l2: Sequence[float] = L2
) -> ClassifierResult:
    """Fit on ``train``, choose the L2 strength on validation wF1, answer on ``test_features`` (N, F).

    Minimises the mean over samples of the summed binary cross-entropies plus l2/2·|W|² (biases are free), on
    features standardised by the training samples' mean and deviation. Strengths are tried from strong to
    weak, each from the last one's solution; the stronger wins a tie. ``chosen`` holds ``l2``. ValueError
    where shapes disagree or a feature is not finite.
    """
    check_splits(train, validation, test_features)
    if not l2 or min(l2) <= 0:
        raise ValueError(f"l2 {tuple(l2)} must hold strengths, all above 0: without one there is no optimum")
    mean, scale = _moments(train.features)
    x, y = _standard(train.features, mean, scale), torch.tensor(train.labels).double()
    seen = _standard(validation.features, mean, scale)
    weights = _initial(y, x.shape[1])
    best: tuple[float, float, Tensor, MultilabelCounts] | None = None
    for strength in sorted(set(l2), reverse=True):
        weights = _minimise(x, y, weights, strength)
        counts = MultilabelCounts.of((_scores(seen, weights) > THRESHOLD).numpy(), validation.labels)
        if best is None or counts.wf1() > best[0]:
            best = (counts.wf1(), strength, weights, counts)
    assert best is not None
    _, strength, weights, counts = best
    scores = _scores(_standard(test_features, mean, scale), weights)
    return ClassifierResult(
        predicted=(scores > THRESHOLD).numpy(),
        scores=scores.float().numpy(),
        chosen={"l2": strength},
        validation=counts,
    )


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = features.astype(np.float64)
    deviation = wide.std(axis=0)
    # A feature that never moves in training must not blow up a test sample where it does.
    floor = 1e-6 * max(float(deviation.max()), 1e-12)
    return wide.mean(axis=0), np.where(deviation > floor, deviation, np.inf)


def _standard(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Tensor:
    return torch.from_numpy((features.astype(np.float64) - mean) / scale)


def _initial(y: Tensor, num_features: int) -> Tensor:
    """(F + 1, C): weights of zero over biases at the classes' log-odds, finite where a class is absent."""
    rate = (y.sum(0) + 0.5) / (len(y) + 1)
    return torch.cat([torch.zeros(num_features, y.shape[1], dtype=y.dtype), torch.logit(rate)[None]])


def _minimise(x: Tensor, y: Tensor, start: Tensor, strength: float) -> Tensor:
    """The weights (F + 1, C) that minimise the regularised mean loss."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(y)
        total = fit + 0.5 * strength * weights[:-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _scores(x: Tensor, weights: Tensor) -> Tensor:
    return torch.sigmoid(x @ weights[:-1] + weights[-1])

"""Linear probe on one frozen feature vector per tile: a logistic regression, per class or over all classes.

Full-batch L-BFGS in float64 from zero weights: the result has no random part and no learning rate to tune.
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
from maestro_scale.evaluation.features.on_device import to_device
from maestro_scale.evaluation.metrics import MultilabelCounts
from maestro_scale.evaluation.probes.decision import SEVERAL_CLASSES, Decision

CPU = torch.device("cpu")

L2 = (1.0, 0.1, 0.01, 0.001, 0.0001)

_MAX_ITERATIONS = 200
_TOLERANCE = 1e-6  # largest gradient entry of the mean loss


def linear_probe(
    train: LabelledFeatures,
    validation: LabelledFeatures,
    test_features: np.ndarray,
    l2: Sequence[float] = L2,
    device: torch.device = CPU,
    decision: Decision = SEVERAL_CLASSES,
    class_weights: Sequence[float] | None = None,
) -> ClassifierResult:
    """Fit on ``train``, select the L2 strength by validation wF1, predict ``test_features`` (N, F).

    Minimises the mean over samples of the summed binary cross-entropies (or, with one class per sample, of the
    cross-entropy: ``decision``; times ``class_weights`` (C,)) plus l2/2·|W|² (biases are free), on
    features standardised by mean and standard deviation of the training samples. Strengths are fitted from strong to
    weak, each from the solution of the one before; the stronger wins a tie. ``chosen`` holds ``l2``. ``device``:
    computes the fit. ValueError where shapes disagree or a feature is not finite.
    """
    check_splits(train, validation, test_features)
    if not l2 or min(l2) <= 0:
        raise ValueError(
            f"l2 {tuple(l2)} must contain values above 0 only: without regularisation there is no optimum"
        )
    mean, scale = feature_scale(train.features)
    x = standardised(train.features, mean, scale, device)
    y = to_device(np.array(train.labels), device).double()
    class_weight = (
        None if class_weights is None else torch.tensor(class_weights, dtype=y.dtype, device=device)
    )
    x_validation = standardised(validation.features, mean, scale, device)
    weights = _initial(y, x.shape[1])
    best: tuple[float, float, Tensor, MultilabelCounts] | None = None
    for strength in sorted(set(l2), reverse=True):
        weights = _minimise(x, y, weights, strength, decision, class_weight)
        predicted = decision.predict(decision.scores(_logits(x_validation, weights))).cpu().numpy()
        counts = MultilabelCounts.of(predicted, validation.labels)
        if best is None or counts.wf1() > best[0]:
            best = (counts.wf1(), strength, weights, counts)
    assert best is not None  # l2 is not empty
    _, strength, weights, counts = best
    scores = decision.scores(_logits(standardised(test_features, mean, scale, device), weights)).cpu()
    return ClassifierResult(
        predicted=decision.predict(scores).numpy(),
        scores=scores.float().numpy(),
        chosen={"l2": strength},
        validation=counts,
    )


def feature_scale(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (F,) of features (N, F), in float64."""
    wide = features.astype(np.float64)
    deviation = wide.std(axis=0)
    # A feature that is constant in training is dropped (scale inf): its test values would be divided by almost 0.
    floor = 1e-6 * max(float(deviation.max()), 1e-12)
    return wide.mean(axis=0), np.where(deviation > floor, deviation, np.inf)


def standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray, device: torch.device) -> Tensor:
    """Features (N, F) minus mean over scale, float64 on the device."""
    return to_device((features.astype(np.float64) - mean) / scale, device)


def _initial(y: Tensor, num_features: int) -> Tensor:
    """(F + 1, C): zero weights above biases at the log-odds of the classes, finite also for absent ones."""
    rate = (y.sum(0) + 0.5) / (len(y) + 1)
    return torch.cat([y.new_zeros(num_features, y.shape[1]), torch.logit(rate)[None]])


def _minimise(
    x: Tensor, y: Tensor, start: Tensor, strength: float, decision: Decision, class_weight: Tensor | None
) -> Tensor:
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
        fit = decision.loss(_logits(x, weights), y, class_weight) / len(y)
        total = fit + 0.5 * strength * weights[:-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]

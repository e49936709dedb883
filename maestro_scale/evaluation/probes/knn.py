"""Weighted k-nearest-neighbour classifier and regression on one frozen feature vector per tile.

As in the evaluation of DINO (arXiv 2104.14294), extended to several labels and to numbers: cosine similarity,
neighbours weighted by exp(similarity / temperature), the score of a class is its weighted share among the neighbours.
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

NEIGHBOURS = (5, 10, 20, 50)
TEMPERATURES = (0.03, 0.07, 0.2)

_CHUNK = 1024  # queries per product: similarities to 50,000 tiles take 200 MB


def knn(
    train: LabelledFeatures,
    validation: LabelledFeatures,
    test_features: np.ndarray,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperatures: Sequence[float] = TEMPERATURES,
    device: torch.device = CPU,
    decision: Decision = SEVERAL_CLASSES,
) -> ClassifierResult:
    """Classify test samples by their neighbours in ``train``; k and temperature are those with the best validation wF1.

    ``test_features``: (N, F). A k above the number of training samples becomes that number; the first candidate wins a
    tie. ``device``: computes the similarities, in fp32. ``decision``: how shares become predictions. ``chosen``
    holds ``k`` and ``temperature``. ValueError where shapes disagree or a feature is not finite.
    """
    check_splits(train, validation, test_features)
    if not neighbours or not temperatures:
        raise ValueError("kNN needs at least one candidate for k and for the temperature")
    ks = sorted({min(k, len(train.features)) for k in neighbours})
    bank, labels = unit_vectors(train.features, device), to_device(np.array(train.labels), device)
    similarity, nearest = nearest_neighbours(unit_vectors(validation.features, device), bank, ks[-1])
    best: tuple[float, int, float, MultilabelCounts] | None = None
    for k in ks:
        for temperature in temperatures:
            scores = neighbour_mean(similarity, nearest, labels, k, temperature)
            counts = MultilabelCounts.of(decision.predict(scores).cpu().numpy(), validation.labels)
            if best is None or counts.wf1() > best[0]:
                best = (counts.wf1(), k, temperature, counts)
    assert best is not None  # there is a candidate
    _, k, temperature, counts = best
    similarity, nearest = nearest_neighbours(unit_vectors(test_features, device), bank, k)
    scores = neighbour_mean(similarity, nearest, labels, k, temperature).cpu()
    return ClassifierResult(
        predicted=decision.predict(scores).numpy(),
        scores=scores.numpy(),
        chosen={"k": k, "temperature": temperature},
        validation=counts,
    )


def unit_vectors(features: np.ndarray, device: torch.device) -> Tensor:
    """Features (N, F) at length 1, in fp32."""
    return torch.nn.functional.normalize(to_device(np.array(features, np.float32), device), dim=1)


def nearest_neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and bank indices of the k nearest, (N, k) each, nearest first."""
    parts = [torch.topk(chunk @ bank.T, k, dim=1) for chunk in queries.split(_CHUNK)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def neighbour_mean(similarity: Tensor, nearest: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """Weighted share of each class (or mean of each number) among the first k neighbours, (N, C) float32."""
    weights = torch.softmax(similarity[:, :k] / temperature, dim=1)
    return torch.einsum("nk,nkc->nc", weights, labels[nearest[:, :k]].float())

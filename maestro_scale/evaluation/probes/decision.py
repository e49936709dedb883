"""How class scores become predictions, and the loss of a linear probe: several classes per tile, or exactly one.

Shapes: N samples, C classes. Labels are (N, C) bool in both cases; with one class per tile each row has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 0.5  # by protocol; one chosen on validation would make another metric of it


@dataclass(frozen=True)
class Decision:
    """``scores``: logits (N, C) to scores in [0, 1]; ``predict``: scores to predictions (N, C) bool; ``loss``: logits,
    labels (N, C) and class weights (C,) or None to the sum over samples."""

    scores: Callable[[Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _above_threshold(scores: Tensor) -> Tensor:
    return scores > THRESHOLD


def _binary_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels, weight=weights, reduction="sum")


def _highest(scores: Tensor) -> Tensor:
    return F.one_hot(scores.argmax(dim=1), scores.shape[1]).bool()


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=1)


def _categorical_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    return F.cross_entropy(logits, labels.argmax(dim=1), weight=weights, reduction="sum")


SEVERAL_CLASSES = Decision(torch.sigmoid, _above_threshold, _binary_loss)
"""Each class by itself, above one half."""

ONE_CLASS = Decision(_softmax, _highest, _categorical_loss)
"""The class with the highest score; the first one of a tie."""

"""Input and result of a classifier on frozen features: features with multilabel targets, and predictions.

Shapes: N samples, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maestro_scale.evaluation.metrics import MultilabelCounts


@dataclass(frozen=True)
class LabelledFeatures:
    """``features`` (N, F) float and multilabel ``labels`` (N, C) bool of the same samples.

    ValueError if there is no sample, the lengths differ, or a feature is not finite.
    """

    features: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        check_features(self.features)
        if self.labels.ndim != 2 or self.labels.dtype != bool or len(self.labels) != len(self.features):
            raise ValueError(
                f"labels {self.labels.shape} {self.labels.dtype} must be (samples, classes) bool "
                f"for features {self.features.shape}"
            )
        if len(self.features) == 0:
            raise ValueError("there is no sample to fit on: the split, or the fraction of it, is empty")


@dataclass(frozen=True)
class ClassifierResult:
    """Predictions of a fitted classifier on N test samples.

    ``scores`` (N, C) float32 in [0, 1]; ``predicted`` (N, C) bool: scores > 0.5. ``chosen``: hyperparameters selected
    on validation; ``validation``: counts on the validation samples with them.
    """

    predicted: np.ndarray
    scores: np.ndarray
    chosen: Mapping[str, float]
    validation: MultilabelCounts


def check_features(features: np.ndarray, like: LabelledFeatures | None = None) -> None:
    """ValueError unless ``features`` is (N, F), finite, and as wide as those of ``like``."""
    if features.ndim != 2:
        raise ValueError(f"features {features.shape} must be (samples, features)")
    if like is not None and features.shape[1] != like.features.shape[1]:
        raise ValueError(
            f"features {features.shape} and {like.features.shape} differ in width: not of one encoder"
        )
    if not np.isfinite(features).all():
        row = int(np.argmin(np.isfinite(features).all(axis=1)))
        raise ValueError(f"features of sample {row} are not finite: the encoder overflowed or read NaN")


def check_splits(train: LabelledFeatures, validation: LabelledFeatures, test_features: np.ndarray) -> None:
    """ValueError unless all three have the same features and classes."""
    check_features(validation.features, train)
    check_features(test_features, train)
    if train.labels.shape[1] != validation.labels.shape[1]:
        raise ValueError(
            f"train has {train.labels.shape[1]} classes, validation {validation.labels.shape[1]}"
        )

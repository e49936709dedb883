"""The interface of an evaluation task: what its predictions contain, its classifiers, and the loss settings.

Shapes: B crops, M crops of a split, F features, C classes that count, H×W label pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.baselines.baseline import FrozenEncoder
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.probes.dense import PixelLayout
from maestro_scale.stream.batch import Batch

NUM_MAPS = 4  # tiles whose label and predicted maps are stored with a result


@dataclass(frozen=True)
class LossSettings:
    """The loss of a linear probe, an attentive probe or a finetuning (``evaluation`` of a recipe).

    ``class_weights``: ``none``, ``balanced`` (inverse to the number of training labels of the class), or a weight by
    class name, 1 for the others. ``regression``: squared error, or smooth L1, of standardised values.
    """

    class_weights: Literal["none", "balanced"] | Mapping[str, float] = "none"
    regression: Literal["l2", "smooth_l1"] = "l2"

    def identity(self) -> dict[str, object]:
        """The settings that differ from the default, as plain values: part of the identity of a finetuning."""
        weights = self.class_weights if isinstance(self.class_weights, str) else dict(self.class_weights)
        found = {"class_weights": weights, "regression_loss": self.regression}
        default = {"class_weights": "none", "regression_loss": "l2"}
        return {name: value for name, value in found.items() if value != default[name]}


DEFAULT_LOSS = LossSettings()


@dataclass(frozen=True)
class Predictions:
    """Predictions on the test split, as far as scores and maps need them."""

    counts: np.ndarray
    """(tiles, …) sufficient statistics of each tile: exact integer counts, or float64 sums of a regression. Their sum
    over tiles (``Task.total``) is what is scored, resamples of them its interval."""
    chosen: Mapping[str, float]
    """Hyperparameters selected on validation."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores other than the task's, by name."""
    maps: Mapping[str, np.ndarray] | None = None
    """``truth`` (labels) and ``answer`` (predictions) of the first few tiles, (n, H, W) each: uint8, or float32 of a
    regression."""
    tile_maps: Callable[[], Iterator[np.ndarray]] | None = None
    """Predicted maps (H, W) of all tiles in order; a function, so that they are computed only where they are wanted."""
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Tiles by (target, predicted) class, where it does not follow from ``counts``."""


Classifier = Callable[[FeatureCache, FeatureCache, FeatureCache, int, torch.device], Predictions]
"""(train, val, test, seed, device): fits on train, selects hyperparameters on val, predicts test."""


class Task(Protocol):
    """What is predicted on a benchmark and how it is scored."""

    @property
    def target(self) -> Target:
        """The target in the shards."""
        ...

    @property
    def metric(self) -> str:
        """One of ``results.METRICS``."""
        ...

    @property
    def feature_dtype(self) -> str:
        """In which features are stored on disk."""
        ...

    @property
    def num_crops(self) -> int | None:
        """Crops of a large tile that are evaluated; None for all."""
        ...

    @property
    def layout(self) -> PixelLayout | None:
        """How cells and label pixels correspond; None for a task with labels of whole tiles."""
        ...

    @property
    def loss(self) -> LossSettings:
        """Settings of losses on this task."""
        ...

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """Classifiers on ``features``, by mode."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C classes that count; empty for a regression."""
        ...

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, …, F) features of a batch."""
        ...

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, …) labels of a batch on the host. EvaluationError as ``check_labels``."""
        ...

    def check_labels(self, batch: Batch) -> None:
        """EvaluationError where a batch on the host does not have labels of this task."""
        ...

    def label_tensor(self, batch: Batch) -> Tensor:
        """As ``labels``, on the device of the batch; not checked, so that the host does not wait for the device."""
        ...

    def encode_labels(self, values: Tensor) -> Tensor:
        """``label_tensor`` of stored values (B, …) of the target."""
        ...

    def label_counts(self, labels: np.ndarray) -> np.ndarray:
        """Sums over labels (as of ``labels``) that a loss needs: (C,) labels of each class, or (3,) number, sum and sum
        of squares of a regression. They add over parts of a split."""
        ...

    def total(self, counts: np.ndarray) -> np.ndarray:
        """The sum of ``Predictions.counts`` over tiles."""
        ...

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """The score of summed counts; leading axes are resamples."""
        ...

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """(C,) scores of summed counts, NaN where a class is in no target."""
        ...

    def confusion(self, counts: np.ndarray) -> tuple[tuple[int, ...], ...] | None:
        """Pixels by (target, predicted) class of summed counts; None for a task without pixels."""
        ...


def integer_total(counts: np.ndarray) -> np.ndarray:
    """The sum over tiles of integer counts, which may be stored as floats (sums over ranks are)."""
    return counts.sum(axis=0, dtype=np.int64)

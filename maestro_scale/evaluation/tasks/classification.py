"""The task of predicting one class per tile, and its loss. Tiles without a label are left out of losses and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale.datasets.spec import MISSING_CLASS, Target
from maestro_scale.evaluation.baselines.baseline import FrozenEncoder
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.labelled_features import LabelledFeatures
from maestro_scale.evaluation.features.missing import tile_vector
from maestro_scale.evaluation.metrics import class_counts, classification_scores, confusion, f1, wf1
from maestro_scale.evaluation.probes.decision import ONE_CLASS
from maestro_scale.evaluation.probes.knn import knn
from maestro_scale.evaluation.probes.linear import linear_probe
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.class_weights import ClassWeights, class_weights
from maestro_scale.evaluation.tasks.protocol import (
    DEFAULT_LOSS,
    Classifier,
    LossSettings,
    Predictions,
    integer_total,
)
from maestro_scale.stream.batch import Batch

UNLABELLED = -1
"""In labels: the tile has no label, or one that is ignored."""


@dataclass(frozen=True)
class ClassificationTask:
    """One class per tile, predicted from one feature vector per tile; scored by wF1. Shapes as in ``protocol``."""

    target: Target
    loss: LossSettings = DEFAULT_LOSS
    metric: ClassVar[str] = "wf1"
    feature_dtype: ClassVar[str] = "float32"
    num_crops: ClassVar[int | None] = 1  # one prediction per tile
    layout: ClassVar[None] = None
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN and multinomial logistic regression."""
        return {"knn": self._knn, "probe": self._probe}

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that is not ignored."""
        return tuple(c for i, c in enumerate(self.target.classes) if i not in self.target.ignored)

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, F = S·E): the mean over each sensor's tokens, concatenated over sensors."""
        return tile_vector(model, batch)

    def labels(self, batch: Batch) -> np.ndarray:
        """(B,) int64: index among the classes that count, ``UNLABELLED`` where there is none."""
        self.check_labels(batch)
        return self.label_tensor(batch).numpy()

    def check_labels(self, batch: Batch) -> None:
        """EvaluationError where a label is neither a class, nor ignored, nor missing."""
        known = {*range(len(self.target.classes)), *self.target.ignored, MISSING_CLASS}
        if unknown := set(batch.targets[self.target.name].flatten().tolist()) - known:
            raise EvaluationError(
                f"{self.target.name} holds the value {min(unknown)} (in {batch.keys[0]} …), which is not a class"
            )

    def label_tensor(self, batch: Batch) -> Tensor:
        """As ``labels``."""
        return self.encode_labels(batch.targets[self.target.name])

    def encode_labels(self, values: Tensor) -> Tensor:
        """(B, 1) stored values -> (B,) int64."""
        return self._label_table(values.device)[values[:, 0].long() + 1]

    def _label_table(self, device: torch.device) -> Tensor:
        """(values + 1,) int64: stored value + 1 -> index among the classes that count."""
        table = self._tables.get(device)
        if table is None:  # filled by kernels: the host would wait for the copy of a list
            size = max(len(self.target.classes), *(i + 1 for i in self.target.ignored), 1)
            table = torch.full((size + 1,), UNLABELLED, dtype=torch.int64, device=device)
            counted = [i for i, _ in enumerate(self.target.classes) if i not in self.target.ignored]
            for index, value in enumerate(counted):
                table[value + 1].fill_(index)
            self._tables[device] = table
        return table

    def label_counts(self, labels: np.ndarray) -> np.ndarray:
        """(C,) tiles of each class."""
        return np.bincount(labels[labels >= 0], minlength=len(self.classes)).astype(np.float64)

    total = staticmethod(integer_total)

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """wF1 of (…, 3, C); NaN where no tile has a label, as in a test split without labels."""
        labelled = np.asarray(counts)[..., [0, 2], :].sum((-2, -1)) > 0
        return np.where(labelled, wf1(counts), np.nan)

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """F1 per class."""
        tp, _, fn = counts
        return np.where(tp + fn > 0, f1(counts), np.nan)

    def confusion(self, counts: np.ndarray) -> None:
        """None: it does not follow from the counts (``Predictions.confusion``)."""

    def predictions(
        self, predicted: np.ndarray, labels: np.ndarray, chosen: Mapping[str, float]
    ) -> Predictions:
        """From predicted classes (N,) and labels (N,) of N tiles."""
        num = len(self.classes)
        counts = class_counts(predicted, labels, num)
        rows = confusion(predicted[labels >= 0], labels[labels >= 0], num)
        return Predictions(
            counts,
            chosen,
            classification_scores(integer_total(counts)),
            confusion=tuple(tuple(row) for row in rows.tolist()),
        )

    def _knn(
        self, train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
    ) -> Predictions:
        fitted = knn(
            self._labelled(train, "training"),
            self._labelled(val, "validation"),
            np.asarray(test.features),
            device=device,
            decision=ONE_CLASS,
        )
        return self.predictions(fitted.predicted.argmax(axis=1), np.asarray(test.labels), fitted.chosen)

    def _probe(
        self, train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
    ) -> Predictions:
        weights = class_weights(self.loss, self.classes, self.label_counts(np.asarray(train.labels)))
        fitted = linear_probe(
            self._labelled(train, "training"),
            self._labelled(val, "validation"),
            np.asarray(test.features),
            device=device,
            decision=ONE_CLASS,
            class_weights=None if weights is None else weights.values,
        )
        return self.predictions(fitted.predicted.argmax(axis=1), np.asarray(test.labels), fitted.chosen)

    def _labelled(self, split: FeatureCache, which: str) -> LabelledFeatures:
        """The tiles that have a label, as one-hot rows. EvaluationError if there is none."""
        labels = np.asarray(split.labels)
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise EvaluationError(
                f"every label of the {which} split is missing or ignored: use another split"
            )
        one_hot = labels[rows, None] == np.arange(len(self.classes))
        return LabelledFeatures(np.asarray(split.features)[rows], one_hot)


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy, the mean over the tiles that have a label; weighted by class where ``weights`` (C,) are given."""

    task: ClassificationTask
    weights: ClassWeights | None = None
    num_crops: int = 1
    tile_shape: tuple[int, ...] = (2,)  # label, predicted class

    def prepare(self, head: nn.Module) -> None:
        """Nothing."""

    def loss_targets(self, labels: Tensor) -> Tensor:
        """(B,) int64."""
        return labels

    def num_terms(self, targets: Tensor) -> Tensor:
        """Tiles with a label, or the sum of their weights."""
        counted = targets != UNLABELLED
        if self.weights is None:
            return counted.sum().double()
        return torch.where(counted, self.weights.on(targets.device)[targets.clamp_min(0)], 0.0).sum().double()

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits are (B, C)."""
        weight = None if self.weights is None else self.weights.on(targets.device)
        return F.cross_entropy(logits.float(), targets, weight, ignore_index=UNLABELLED, reduction="sum")

    def predict(self, logits: Tensor) -> Tensor:
        """(B,) index of the most probable class."""
        return logits.argmax(dim=1)

    def per_tile(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(B, 2): label and predicted class."""
        return np.stack([labels, predicted], axis=1)

    def first_maps(self, predicted: np.ndarray, labels: np.ndarray) -> None:
        """None: labels are of whole tiles."""

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """Empty."""
        return iter(())

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """The most probable class of each tile is predicted."""
        labels, predicted = tiles.astype(np.int64).T
        return self.task.predictions(predicted, labels, {})

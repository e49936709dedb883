"""Losses of a network with a head on a labelled target, and how its logits are scored, by kind of target.

Losses are sums over terms, divided by the number of terms in the global batch (never a mean of means): the loss does
not depend on how a batch is split over ranks and micro-batches. Shapes: B crops, T tiles of them, C classes that count,
H×W label pixels, P cells, Q pixels each (see ``probes.dense``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.metrics import segmentation_scores
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.tasks.class_weights import ClassWeights, class_weights
from maestro_scale.evaluation.tasks.classification import ClassificationLoss, ClassificationTask
from maestro_scale.evaluation.tasks.maps import first_tiles, tile_maps
from maestro_scale.evaluation.tasks.protocol import Predictions, Task, integer_total
from maestro_scale.evaluation.tasks.regression import (
    LabelScale,
    RegressionLoss,
    RegressionMapLoss,
    RegressionMapTask,
    RegressionTask,
)
from maestro_scale.evaluation.tasks.task import MultilabelTask, SegmentationTask, multilabel_predictions


class TargetLoss(Protocol):
    """Loss and scores of one task. ``labels`` (B, …) are always as ``task.labels`` returns them.

    Nothing that takes tensors makes the host wait for the device.
    """

    @property
    def task(self) -> Task:
        """What is predicted."""
        ...

    @property
    def num_crops(self) -> int:
        """Crops of a tile that are evaluated together."""
        ...

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of ``per_tile``, without its first axis."""
        ...

    def prepare(self, head: nn.Module) -> None:
        """Store in a new head what predictions need besides its weights."""
        ...

    def loss_targets(self, labels: Tensor) -> Tensor:
        """(B, …) what logits are compared with; ``labels`` as of ``task.label_tensor``."""
        ...

    def num_terms(self, targets: Tensor) -> Tensor:
        """() float64: number of terms in the loss of these targets."""
        ...

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the loss's terms, in fp32."""
        ...

    def predict(self, logits: Tensor) -> Tensor:
        """(B, …) what scores and maps need of logits: ``predicted`` below, on the device of the logits."""
        ...

    def per_tile(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(T, *tile_shape): everything that scoring needs of whole tiles. Rows of all ranks can be concatenated."""
        ...

    def first_maps(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray] | None:
        """``truth`` and ``answer`` maps of the first few tiles, (n, H, W) each; None for a task without maps."""
        ...

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """(H, W) predicted map of each tile of a batch; empty for a task without maps."""
        ...

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """Counts and scores from ``per_tile`` of all tiles of a split."""
        ...


@dataclass(frozen=True)
class MultilabelLoss:
    """Binary cross-entropy of every class, the mean over samples and classes; weighted where ``weights`` are given."""

    task: MultilabelTask
    weights: ClassWeights | None = None
    num_crops: int = 1

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Probabilities and labels of the C classes."""
        return 2, len(self.task.classes)

    def prepare(self, head: nn.Module) -> None:
        """Nothing."""

    def loss_targets(self, labels: Tensor) -> Tensor:
        """(B, C) bool."""
        return labels

    def num_terms(self, targets: Tensor) -> Tensor:
        """B·C, or the sum of the weights."""
        count = torch.full((), targets.numel(), dtype=torch.float64, device=targets.device)
        return count if self.weights is None else count * self.weights.on(targets.device).double().mean()

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits are (B, C)."""
        weight = None if self.weights is None else self.weights.on(targets.device)
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), weight, reduction="sum")

    def predict(self, logits: Tensor) -> Tensor:
        """(B, C) probabilities."""
        return logits.float().sigmoid()

    def per_tile(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(B, 2, C): probabilities, and labels as 0 and 1."""
        return np.stack([predicted, labels], axis=1)

    def first_maps(self, predicted: np.ndarray, labels: np.ndarray) -> None:
        """None: labels are of whole tiles."""

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """Empty."""
        return iter(())

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """A class is predicted where its probability is above one half."""
        return multilabel_predictions(tiles[:, 0] > 0.5, tiles[:, 0], tiles[:, 1] > 0.5, {})


@dataclass(frozen=True)
class SegmentationLoss:
    """Cross-entropy of every pixel, the mean over the pixels that count; weighted by class where ``weights`` are
    given."""

    task: SegmentationTask
    weights: ClassWeights | None = None

    @property
    def num_crops(self) -> int:
        """All of a tile: its map is assembled from them."""
        return self.task.layout.crop_grid.num_crops

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Pixels by (target, predicted) class; the last row counts ignored pixels."""
        return len(self.task.classes) + 1, len(self.task.classes)

    def prepare(self, head: nn.Module) -> None:
        """Nothing."""

    def loss_targets(self, labels: Tensor) -> Tensor:
        """(B, P, Q) int64."""
        return self.task.layout.per_cell(labels).long()

    def num_terms(self, targets: Tensor) -> Tensor:
        """Pixels of the model's image with a label that counts, or the sum of their weights."""
        counted = targets != dense.IGNORED
        if self.weights is None:
            return counted.sum().double()
        weight = self.weights.on(targets.device)[torch.where(counted, targets, 0)]
        return torch.where(counted, weight, 0.0).sum(dtype=torch.float64)

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits are (B, C, grid·side, grid·side)."""
        cells = rearrange(logits.float(), "b c (h p) (w q) -> b c (h w) (p q)", h=self._grid, w=self._grid)
        if torch.are_deterministic_algorithms_enabled():
            # Only the loss of (N, C) has a deterministic algorithm on GPUs, not that of maps.
            cells, targets = rearrange(cells, "b c n m -> (b n m) c"), targets.flatten()
        weight = None if self.weights is None else self.weights.on(targets.device)
        return F.cross_entropy(cells, targets, weight, ignore_index=dense.IGNORED, reduction="sum")

    def predict(self, logits: Tensor) -> Tensor:
        """(B, P, Q) uint8 index of the most probable class."""
        best = logits.argmax(1).byte()
        return rearrange(best, "b (h p) (w q) -> b (h w) (p q)", h=self._grid, w=self._grid)

    def per_tile(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(T, C + 1, C) confusion of each tile, each of its label pixels once."""
        return dense.confusions(
            self.task.layout,
            len(self.task.classes),
            predicted,
            FeatureCache(predicted, labels, np.arange(len(labels))),
        )

    def first_maps(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Class numbers as in ``task.labels``."""
        return {
            "truth": first_tiles(self.task.layout, labels),
            "answer": first_tiles(self.task.layout, self.task.layout.per_pixel(predicted)),
        }

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """Class numbers as in ``task.labels``."""
        return tile_maps(self.task.layout, predicted)

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """The most probable class of each pixel is predicted."""
        return Predictions(tiles, {}, segmentation_scores(integer_total(tiles)))

    @property
    def _grid(self) -> int:
        return self.task.layout.grid


def needs_label_counts(task: Task) -> bool:
    """Whether the loss of a task depends on the training labels as a whole, so that they must be read before."""
    return isinstance(task, RegressionTask | RegressionMapTask) or task.loss.class_weights != "none"


def target_loss_for(task: Task, label_counts: np.ndarray | None = None) -> TargetLoss:
    """The loss of a task. ``label_counts``: of all training labels (``Task.label_counts``), where
    ``needs_label_counts``; without them a regression is not standardised."""
    if isinstance(task, RegressionTask | RegressionMapTask):
        scale = LabelScale() if label_counts is None else LabelScale.of(label_counts)
        if isinstance(task, RegressionTask):
            return RegressionLoss(task, scale)
        return RegressionMapLoss(task, scale)
    weights = class_weights(task.loss, task.classes, label_counts)
    if isinstance(task, ClassificationTask):
        return ClassificationLoss(task, weights)
    if isinstance(task, MultilabelTask):
        return MultilabelLoss(task, weights)
    assert isinstance(task, SegmentationTask)  # task_for makes no other kind
    return SegmentationLoss(task, weights)

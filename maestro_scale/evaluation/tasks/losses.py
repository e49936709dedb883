"""What a network with a head learns from labels and how its answers are counted, by kind of target.

Shapes: B crops, T tiles of them, C classes that count, H×W label pixels, P places, Q pixels each (see ``dense``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.metrics import segmentation_scores
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.tasks.task import (
    MultilabelTask,
    Predictions,
    SegmentationTask,
    Task,
    multilabel_predictions,
)


class TargetLoss(Protocol):
    """``crops``: of a tile that are looked at. ``shape``: of what ``per_tile`` gives, without its first axis.

    ``labels`` (B, …) are everywhere as the task has them.
    """

    task: Task
    num_crops: int
    tile_shape: tuple[int, ...]

    def loss_targets(self, labels: np.ndarray) -> Tensor:
        """(B, …) what logits are held targets."""
        ...

    def num_terms(self, targets: Tensor) -> int:
        """Terms of the loss: it is their sum over the global batch, divided by their number."""
        ...

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the loss's terms, fp32."""
        ...

    def per_tile(self, logits: Tensor, labels: np.ndarray) -> np.ndarray:
        """(T, *shape): all that scoring needs to know of whole tiles."""
        ...

    def first_maps(self, logits: Tensor, labels: np.ndarray) -> dict[str, np.ndarray] | None:
        """Label and answer of the first few tiles, (n, H, W) each, where there are such maps."""
        ...

    def tile_maps(self, logits: Tensor) -> Iterator[np.ndarray]:
        """(H, W) answers of each tile of a batch, where there are maps."""
        ...

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """The counts and scores of what ``per_tile`` gave for a split."""
        ...


@dataclass(frozen=True)
class MultilabelLoss:
    """Each class is there or not: binary cross-entropy, the mean over samples and classes."""

    task: MultilabelTask
    num_crops: int = 1

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Scores and labels."""
        return 2, len(self.task.classes)

    def loss_targets(self, labels: np.ndarray) -> Tensor:
        """(B, C) bool."""
        return torch.from_numpy(labels)

    def num_terms(self, targets: Tensor) -> int:
        """B·C."""
        return targets.numel()

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of logits (B, C)."""
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum")

    def per_tile(self, logits: Tensor, labels: np.ndarray) -> np.ndarray:
        """(B, 2, C): probabilities, and labels as 0 and 1."""
        return np.stack([logits.float().sigmoid().cpu().numpy(), labels], axis=1)

    def first_maps(self, logits: Tensor, labels: np.ndarray) -> None:
        """There are none."""

    def tile_maps(self, logits: Tensor) -> Iterator[np.ndarray]:
        """There are none."""
        return iter(())

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """A class is answered where its probability is above one half."""
        return multilabel_predictions(tiles[:, 0] > 0.5, tiles[:, 0], tiles[:, 1] > 0.5, {})


@dataclass(frozen=True)
class SegmentationLoss:
    """Each pixel is of one class: cross-entropy, the mean over the pixels that count."""

    task: SegmentationTask

    @property
    def num_crops(self) -> int:
        """All of a tile's."""
        return self.task.layout.crop_grid.num_crops

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Pixels by (target, predicted) class; the last row is of the ignored ones."""
        return len(self.task.classes) + 1, len(self.task.classes)

    def loss_targets(self, labels: np.ndarray) -> Tensor:
        """(B, P, Q) int64."""
        return torch.from_numpy(self.task.layout.per_cell(labels)).long()

    def num_terms(self, targets: Tensor) -> int:
        """Pixels of the model's image that are not ignored."""
        return int((targets != dense.IGNORED).sum())

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of logits (B, C, grid·side, grid·side)."""
        places = rearrange(logits.float(), "b c (h p) (w q) -> b c (h w) (p q)", h=self._grid, w=self._grid)
        return F.cross_entropy(places, targets, ignore_index=dense.IGNORED, reduction="sum")

    def per_tile(self, logits: Tensor, labels: np.ndarray) -> np.ndarray:
        """(T, C + 1, C): each label pixel of each tile once."""
        answers = self._places(logits)
        return dense.confusions(
            self.task.layout,
            len(self.task.classes),
            answers,
            FeatureCache(answers, labels, np.arange(len(labels))),
        )

    def first_maps(self, logits: Tensor, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Class numbers as in ``task.labels``."""
        answers = self.task.layout.per_pixel(self._places(logits))
        return {
            "truth": self.task.first_tiles(labels),
            "answer": self.task.first_tiles(answers),
        }

    def tile_maps(self, logits: Tensor) -> Iterator[np.ndarray]:
        """Class numbers as in ``task.labels``."""
        return self.task.tile_maps(self._places(logits))

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """The most probable class of each pixel is answered."""
        return Predictions(tiles, {}, segmentation_scores(tiles.sum(0)))

    def _places(self, logits: Tensor) -> np.ndarray:
        best = rearrange(logits.argmax(1), "b (h p) (w q) -> b (h w) (p q)", h=self._grid, w=self._grid)
        return best.byte().cpu().numpy()

    @property
    def _grid(self) -> int:
        return self.task.layout.grid


def target_loss_for(task: Task) -> TargetLoss:
    """The objective of a benchmark's task."""
    return MultilabelLoss(task) if isinstance(task, MultilabelTask) else SegmentationLoss(task)

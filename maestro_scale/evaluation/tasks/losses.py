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

from maestro_scale.evaluation.features.cache import Encoded
from maestro_scale.evaluation.metrics import segmentation_scores
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.tasks.task import Answer, Multilabel, Segmentation, Task, multilabel_answer


class Objective(Protocol):
    """``crops``: of a tile that are looked at. ``shape``: of what ``per_tile`` gives, without its first axis.

    ``labels`` (B, …) are everywhere as the task has them.
    """

    task: Task
    crops: int
    shape: tuple[int, ...]

    def against(self, labels: np.ndarray) -> Tensor:
        """(B, …) what logits are held against."""
        ...

    def num_counted(self, against: Tensor) -> int:
        """Terms of the loss: it is their sum over the global batch, divided by their number."""
        ...

    def error_sum(self, logits: Tensor, against: Tensor) -> Tensor:
        """Sum of the loss's terms, fp32."""
        ...

    def per_tile(self, logits: Tensor, labels: np.ndarray) -> np.ndarray:
        """(T, *shape): all that scoring needs to know of whole tiles."""
        ...

    def maps(self, logits: Tensor, labels: np.ndarray) -> dict[str, np.ndarray] | None:
        """Label and answer of the first few tiles, (n, H, W) each, where there are such maps."""
        ...

    def whole_tiles(self, logits: Tensor) -> Iterator[np.ndarray]:
        """(H, W) answers of each tile of a batch, where there are maps."""
        ...

    def answer(self, tiles: np.ndarray) -> Answer:
        """The counts and scores of what ``per_tile`` gave for a split."""
        ...


@dataclass(frozen=True)
class Presence:
    """Each class is there or not: binary cross-entropy, the mean over samples and classes."""

    task: Multilabel
    crops: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Scores and labels."""
        return 2, len(self.task.classes)

    def against(self, labels: np.ndarray) -> Tensor:
        """(B, C) bool."""
        return torch.from_numpy(labels)

    def num_counted(self, against: Tensor) -> int:
        """B·C."""
        return against.numel()

    def error_sum(self, logits: Tensor, against: Tensor) -> Tensor:
        """Of logits (B, C)."""
        return F.binary_cross_entropy_with_logits(logits.float(), against.float(), reduction="sum")

    def per_tile(self, logits: Tensor, labels: np.ndarray) -> np.ndarray:
        """(B, 2, C): probabilities, and labels as 0 and 1."""
        return np.stack([logits.float().sigmoid().cpu().numpy(), labels], axis=1)

    def maps(self, logits: Tensor, labels: np.ndarray) -> None:
        """There are none."""

    def whole_tiles(self, logits: Tensor) -> Iterator[np.ndarray]:
        """There are none."""
        return iter(())

    def answer(self, tiles: np.ndarray) -> Answer:
        """A class is answered where its probability is above one half."""
        return multilabel_answer(tiles[:, 0] > 0.5, tiles[:, 0], tiles[:, 1] > 0.5, {})


@dataclass(frozen=True)
class Cover:
    """Each pixel is of one class: cross-entropy, the mean over the pixels that count."""

    task: Segmentation

    @property
    def crops(self) -> int:
        """All of a tile's."""
        return self.task.layout.crops.num_crops

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels by (target, predicted) class; the last row is of the ignored ones."""
        return len(self.task.classes) + 1, len(self.task.classes)

    def against(self, labels: np.ndarray) -> Tensor:
        """(B, P, Q) int64."""
        return torch.from_numpy(self.task.layout.per_place(labels)).long()

    def num_counted(self, against: Tensor) -> int:
        """Pixels of the model's image that are not ignored."""
        return int((against != dense.IGNORED).sum())

    def error_sum(self, logits: Tensor, against: Tensor) -> Tensor:
        """Of logits (B, C, grid·side, grid·side)."""
        places = rearrange(logits.float(), "b c (h p) (w q) -> b c (h w) (p q)", h=self._grid, w=self._grid)
        return F.cross_entropy(places, against, ignore_index=dense.IGNORED, reduction="sum")

    def per_tile(self, logits: Tensor, labels: np.ndarray) -> np.ndarray:
        """(T, C + 1, C): each label pixel of each tile once."""
        answers = self._places(logits)
        return dense.confusions(
            self.task.layout,
            len(self.task.classes),
            answers,
            Encoded(answers, labels, np.arange(len(labels))),
        )

    def maps(self, logits: Tensor, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Class numbers as in ``task.labels``."""
        answers = self.task.layout.per_pixel(self._places(logits))
        return {
            "truth": self.task.first_tiles(labels),
            "answer": self.task.first_tiles(answers),
        }

    def whole_tiles(self, logits: Tensor) -> Iterator[np.ndarray]:
        """Class numbers as in ``task.labels``."""
        return self.task.whole_tiles(self._places(logits))

    def answer(self, tiles: np.ndarray) -> Answer:
        """The most probable class of each pixel is answered."""
        return Answer(tiles, {}, segmentation_scores(tiles.sum(0)))

    def _places(self, logits: Tensor) -> np.ndarray:
        best = rearrange(logits.argmax(1), "b (h p) (w q) -> b (h w) (p q)", h=self._grid, w=self._grid)
        return best.byte().cpu().numpy()

    @property
    def _grid(self) -> int:
        return self.task.layout.grid


def objective_for(task: Task) -> Objective:
    """The objective of a benchmark's task."""
    return Presence(task) if isinstance(task, Multilabel) else Cover(task)

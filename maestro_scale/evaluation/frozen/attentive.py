"""Attentive probe: the head of a finetuning, trained on tokens of a frozen encoder that were encoded once.

Shapes: M crops, N tokens of all sensors, one behind the other, E width, R token grids of L tokens per sensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from maestro_scale.evaluation.features.baselines import Baseline
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.probes.lr_grid import lr_grid_search
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.evaluation.tasks.losses import TargetLoss
from maestro_scale.evaluation.tasks.task import Predictions, SegmentationTask
from maestro_scale.model.config import DatasetView, ModelConfig
from maestro_scale.model.heads import POOL_HEADS, build_head
from maestro_scale.model.initialise import initialise
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.batch import Batch

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
BATCH_CROPS = 32

_MOST_SETS = 2**16 - 1  # CUDA's attention kernels take no more at once
_MOST_TOKENS = (
    2**17
)  # that a head sees at once: 400 MB at a width of 768, and as much again for each of its layers


def concat_tokens(model: Maestro | Baseline, batch: Batch) -> Tensor:
    """(B, N, E) in the order of the sensors. ResultsError where the tokens' width does not fit the head."""
    grids = model.encode(batch)
    widths = {s.name: grids[s.name].shape[-1] for s in model.view(batch.dataset).sensors}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ResultsError(
            f"an attentive head needs tokens of one width, these have: {listed}; use --mode probe"
        )
    if (width := next(iter(widths.values()))) % POOL_HEADS:
        raise ResultsError(
            f"an attentive head needs tokens whose width {POOL_HEADS} divides, these have {width}; use --mode probe"
        )
    return torch.cat([grids[name].flatten(1, 2) for name in widths], dim=1)


class HeadGrid:
    """One head per learning rate, all of them drawn alike from ``seed``."""

    def __init__(
        self,
        target_loss: TargetLoss,
        view: ModelConfig | DatasetView,
        width: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._target_loss, self._device = target_loss, device
        self._grids = {s.name: (view.rows(s), s.grid**2) for s in view.sensors}
        target, task = target_loss.task.target, target_loss.task
        ref = next((s for s in view.sensors if s.name == view.ref_sensor), None)
        side = task.layout.side if isinstance(task, SegmentationTask) else 0
        self.heads = [build_head(target, width, "attentive", ref, side).to(device) for _ in LEARNING_RATES]
        for made in self.heads:
            initialise(made, seed)
        at_places = sum(rows * (ref.grid**2 if side else cells) for rows, cells in self._grids.values())
        sets = ref.grid**2 if ref and side else 1  # that are pooled, per crop
        self._most_crops = max(min(_MOST_TOKENS // at_places, _MOST_SETS // sets), 1)

    def backward(self, split: FeatureCache, rows: np.ndarray) -> None:
        """Add the gradients of the mean loss over these crops, of each head."""
        targets = self._target_loss.loss_targets(np.array(split.labels[rows]))
        num_terms = max(self._target_loss.num_terms(targets), 1)
        for first in range(0, len(rows), self._most_crops):
            part = slice(first, first + self._most_crops)
            tokens, truth = self._tokens(split, rows[part]), targets[part].to(self._device)
            for made in self.heads:
                (self._target_loss.loss_sum(made(tokens), truth) / num_terms).backward()

    @torch.no_grad()
    def logits(self, made: nn.Module, split: FeatureCache) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(logits, labels as the task has them) of whole tiles, some at a time, in order."""
        crops = self._target_loss.num_crops
        size = crops * max(self._most_crops // crops, 1)
        for first in range(0, len(split), size):
            rows = np.arange(first, min(first + size, len(split)))
            parts = np.array_split(rows, -(-len(rows) // self._most_crops))
            answers = torch.cat([made(self._tokens(split, part)) for part in parts])
            yield answers, np.array(split.labels[first : first + size])

    def _tokens(self, split: FeatureCache, rows: np.ndarray) -> dict[str, Tensor]:
        """{sensor: (m, R, L, E)}."""
        tokens = torch.from_numpy(np.array(split.features[rows])).to(self._device).float()
        parts = tokens.split([rows * cells for rows, cells in self._grids.values()], dim=1)
        return {name: p.unflatten(1, self._grids[name]) for name, p in zip(self._grids, parts, strict=True)}


def attentive_probe(
    target_loss: TargetLoss,
    view: ModelConfig | DatasetView,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device,
) -> Predictions:
    """The answer of an attentive head, as finetuning has it, on frozen tokens ``features`` (M, N, E).

    One head per learning rate, all trained in the same pass; the best on validation answers, the lowest rate wins a
    tie. ResultsError where no label of the training split counts.
    """
    pieces = (train.labels[first : first + BATCH_CROPS] for first in range(0, len(train), BATCH_CROPS))
    if not any(target_loss.num_terms(target_loss.loss_targets(np.array(labels))) for labels in pieces):
        raise ResultsError("there is nothing to fit on: every label of the training split is ignored")
    heads = HeadGrid(target_loss, view, train.features.shape[-1], seed, device)
    lr_grid_search(
        [made.parameters() for made in heads.heads],
        LEARNING_RATES,
        np.arange(len(train)),
        BATCH_CROPS,
        seed,
        lambda rows: heads.backward(train, rows),
    )

    def answers(made: nn.Module, split: FeatureCache) -> Predictions:
        tiles = [target_loss.per_tile(logits, labels) for logits, labels in heads.logits(made, split)]
        return target_loss.predictions(np.concatenate(tiles))

    counts = [answers(made, val).counts.sum(axis=0, dtype=np.int64) for made in heads.heads]
    which = best_index([float(target_loss.task.statistic(c)) for c in counts])
    chosen = heads.heads[which]
    return replace(
        answers(chosen, test),
        chosen={"lr": LEARNING_RATES[which]},
        maps=target_loss.first_maps(*next(heads.logits(chosen, test))),
        tile_maps=lambda: (
            m for logits, _ in heads.logits(chosen, test) for m in target_loss.tile_maps(logits)
        ),
    )

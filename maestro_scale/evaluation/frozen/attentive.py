"""Attentive probe: the head that finetuning uses, trained on cached tokens of a frozen encoder.

Shapes: M crops, N tokens (of all sensors, concatenated), E width, R token grids of L tokens per sensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from maestro_scale.datasets.sensor_sets import split_name
from maestro_scale.evaluation.baselines.baseline import FrozenEncoder, token_view
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.missing import token_width
from maestro_scale.evaluation.features.on_device import to_device
from maestro_scale.evaluation.metric_kinds import METRIC_KINDS
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.probes.lr_grid import lr_grid_search
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.losses import TargetLoss
from maestro_scale.evaluation.tasks.protocol import Predictions
from maestro_scale.model.config import DatasetView, ModelConfig
from maestro_scale.model.decoders import build_head
from maestro_scale.model.heads import POOL_HEADS
from maestro_scale.model.initialise import initialise
from maestro_scale.stream.batch import Batch

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
BATCH_CROPS = 32

_MAX_SETS = 2**16 - 1  # per call: the limit of CUDA's attention kernels
_MAX_TOKENS = (
    2**17
)  # per forward pass of a head: 400 MB at a width of 768, and as much again for each of its layers


def concat_tokens(model: FrozenEncoder, batch: Batch) -> Tensor:
    """(B, N, E) in the order of the sensors; zeros where the tiles lack one, which ``HeadGrid`` leaves out.

    EvaluationError where the width of the tokens does not fit the head.
    """
    grids = model.encode(batch)
    dataset, absent = split_name(batch.dataset)
    view = token_view(model, dataset)
    if absent:
        some = next(iter(grids.values()))
        shapes = {s.name: (len(some), view.rows(s), s.grid**2) for s in view.sensors if s.name in absent}
        grids |= {name: some.new_zeros(*shape, token_width(model, name)) for name, shape in shapes.items()}
    widths = {s.name: grids[s.name].shape[-1] for s in view.sensors}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise EvaluationError(
            f"an attentive head needs tokens of one width, these have: {listed}; use --mode probe"
        )
    if (width := next(iter(widths.values()))) % POOL_HEADS:
        raise EvaluationError(
            f"an attentive head needs tokens whose width {POOL_HEADS} divides, these have {width}; use --mode probe"
        )
    return torch.cat([grids[name].flatten(1, 2) for name in widths], dim=1)


class HeadGrid:
    """One head per learning rate, all with the same initial weights, drawn from ``seed``.

    ``view``: of the dataset, with the reference sensor; ``tokens``: with the sensors and grids of the encoded tokens
    (None: those of ``view``).
    """

    def __init__(
        self,
        target_loss: TargetLoss,
        view: ModelConfig | DatasetView,
        width: int,
        seed: int,
        device: torch.device,
        tokens: ModelConfig | DatasetView | None = None,
    ) -> None:
        tokens = tokens or view
        self._target_loss, self._device = target_loss, device
        self._grids = {s.name: (tokens.rows(s), s.grid**2) for s in tokens.sensors}
        target, layout = target_loss.task.target, target_loss.task.layout
        ref = next((s for s in view.sensors if s.name == view.ref_sensor), None)
        side = layout.side if layout else 0
        self.heads = [build_head(target, width, "attentive", ref, side).to(device) for _ in LEARNING_RATES]
        for head in self.heads:
            initialise(head, seed)
            target_loss.prepare(head)
        # With a map to predict, a head resamples every token grid to the reference grid and pools each cell by itself.
        cells = ref.grid**2 if ref is not None and side else 0
        tokens_per_crop = sum(rows * (cells or length) for rows, length in self._grids.values())
        sets_per_crop = cells or 1
        self._max_crops = max(min(_MAX_TOKENS // tokens_per_crop, _MAX_SETS // sets_per_crop), 1)

    def backward(self, split: FeatureCache, rows: np.ndarray) -> None:
        """Add each head's gradients of the mean loss over these crops, a few crops at a time."""
        targets = self._target_loss.loss_targets(to_device(np.array(split.labels[rows]), self._device))
        num_terms = self._target_loss.num_terms(targets).clamp_min(1).float()
        for part, tokens in self._parts(split, rows):
            # An index only where it is needed: a slice of the targets is a view.
            chosen = targets[part] if isinstance(part, slice) else targets[to_device(part, self._device)]
            for head in self.heads:  # divided by the terms of the whole batch: parts add up to its mean
                (self._target_loss.loss_sum(head(tokens), chosen) / num_terms).backward()

    @torch.no_grad()
    def logits(self, head: nn.Module, split: FeatureCache) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(logits, labels as of ``task.labels``) of whole tiles in order, a few tiles at a time."""
        crops = self._target_loss.num_crops
        size = crops * max(self._max_crops // crops, 1)  # a tile's map needs all of its crops
        for first in range(0, len(split), size):
            rows = np.arange(first, min(first + size, len(split)))
            found = [(part, head(tokens)) for part, tokens in self._parts(split, rows, evenly=True)]
            logits = torch.cat([values for _, values in found])
            if not isinstance(found[0][0], slice):  # by set of sensors, so not in order
                order = np.argsort(np.concatenate([part for part, _ in found]))
                logits = logits[to_device(order, self._device)]
            yield logits, np.array(split.labels[first : first + size])

    def predict(self, head: nn.Module, split: FeatureCache) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As ``logits``, with predictions as of ``TargetLoss.predict`` in their place."""
        for logits, labels in self.logits(head, split):
            yield self._target_loss.predict(logits).cpu().numpy(), labels

    def _parts(
        self, split: FeatureCache, rows: np.ndarray, evenly: bool = False
    ) -> Iterator[tuple[slice | np.ndarray, dict[str, Tensor]]]:
        """(which of ``rows``, their tokens) of a few crops at a time, those of tiles with the same sensors together."""
        if split.absent is None or not ((lacking := split.absent[rows]) != "").any():
            firsts = np.arange(0, len(rows), self._max_crops)
            if evenly:
                firsts = np.array([p[0] for p in np.array_split(np.arange(len(rows)), len(firsts))])
            for first, stop in itertools.pairwise([*firsts.tolist(), len(rows)]):
                part = slice(first, stop)
                yield part, self._tokens(split, rows[part])
            return
        for absent in np.unique(lacking):
            positions = np.flatnonzero(lacking == absent)
            for first in range(0, len(positions), self._max_crops):
                some = positions[first : first + self._max_crops]
                yield some, self._tokens(split, rows[some], absent.split("+"))

    def _tokens(
        self, split: FeatureCache, rows: np.ndarray, absent: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """{sensor: (m, R, L, E)}, without the sensors ``absent``."""
        tokens = to_device(np.array(split.features[rows]), self._device).float()
        parts = tokens.split([rows * length for rows, length in self._grids.values()], dim=1)
        return {
            name: p.unflatten(1, self._grids[name])
            for name, p in zip(self._grids, parts, strict=True)
            if name not in absent
        }


def attentive_probe(
    target_loss: TargetLoss,
    view: ModelConfig | DatasetView,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device,
    tokens: ModelConfig | DatasetView | None = None,
) -> Predictions:
    """Predictions of an attentive head, the one of finetuning, on frozen tokens ``features`` (M, N, E).

    ``view`` and ``tokens`` as of HeadGrid. One head per learning rate, all trained in the same pass; the one with the
    best validation score is used, the lowest rate wins a tie.

    EvaluationError where no label of the training split counts.
    """
    pieces = (train.labels[first : first + BATCH_CROPS] for first in range(0, len(train), BATCH_CROPS))
    targets = (target_loss.loss_targets(torch.from_numpy(np.array(labels))) for labels in pieces)
    if not any(target_loss.num_terms(part) for part in targets):
        raise EvaluationError(
            "there is nothing to fit on: every label of the training split is ignored or missing"
        )
    heads = HeadGrid(target_loss, view, train.features.shape[-1], seed, device, tokens)
    lr_grid_search(
        [head.parameters() for head in heads.heads],
        LEARNING_RATES,
        np.arange(len(train)),
        BATCH_CROPS,
        seed,
        lambda rows: heads.backward(train, rows),
    )

    def predict(head: nn.Module, split: FeatureCache) -> Predictions:
        tiles = [target_loss.per_tile(*batch) for batch in heads.predict(head, split)]
        return target_loss.predictions(np.concatenate(tiles))

    task = target_loss.task
    totals = [task.total(predict(head, val).counts) for head in heads.heads]
    sign = METRIC_KINDS[task.metric].sign
    which = best_index([float(task.statistic(total)) for total in totals], sign=sign)
    chosen = heads.heads[which]
    return replace(
        predict(chosen, test),
        chosen={"lr": LEARNING_RATES[which]},
        maps=target_loss.first_maps(*next(heads.predict(chosen, test))),
        tile_maps=lambda: (
            m for predicted, _ in heads.predict(chosen, test) for m in target_loss.tile_maps(predicted)
        ),
    )

"""Segmentation by probes on frozen features, one vector per cell of the reference grid: kNN and a linear map.

A cell is one token of the reference sensor's grid. It covers side×side pixels of the model's image, and each of these
covers factor×factor pixels of the labels. Shapes: M crops, P = grid² cells, Q = side² pixels each, C classes,
F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from maestro_scale.evaluation.features.arrays import FeatureArray
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.on_device import to_device
from maestro_scale.evaluation.metrics import best_index, confusion, mean_iou
from maestro_scale.evaluation.probes.lr_grid import lr_grid_search
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.stream.crops import CropGrid

Labels = TypeVar("Labels", np.ndarray, Tensor)

IGNORED = 255
CPU = torch.device("cpu")

NEIGHBOURS = (5, 10, 20, 50)
TEMPERATURES = (0.03, 0.07, 0.2)
BANK_CELLS = 100_000  # at most, of training, that kNN compares with
SELECTION_CELLS = 20_000  # at most, of validation, that k and the temperature are selected on

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCH_CELLS = 1024

CHUNK_CELLS = 2048  # compared or predicted at once: bounds the memory of similarities and votes
_SAMPLE_STREAM = 1  # of the random numbers under a seed, see lr_grid


@dataclass(frozen=True)
class PixelLayout:
    """How cells, image pixels and label pixels of a crop correspond, and where crops lie on their tile."""

    grid: int
    side: int
    resolution_m: float
    crop_grid: CropGrid

    def __post_init__(self) -> None:
        if self.crop_pixels % (self.grid * self.side):
            raise ValueError(
                f"labels of {self.crop_pixels} pixels per side are not a multiple of image_size "
                f"{self.grid * self.side}: choose an image_size that divides them"
            )

    @property
    def tile_pixels(self) -> int:
        """Label pixels per side of a tile."""
        return round(self.crop_grid.tile_m / self.resolution_m)

    @property
    def crop_pixels(self) -> int:
        """Label pixels per side of a crop."""
        return self.crop_grid.side(self.resolution_m, self.tile_pixels)

    @property
    def factor(self) -> int:
        """Label pixels per pixel of the image, per side."""
        return self.crop_pixels // (self.grid * self.side)

    def per_cell(self, labels: Labels) -> Labels:
        """(M, H, W) labels -> (M, P, Q): the middle one of each block of factor×factor."""
        middle = labels[:, self.factor // 2 :: self.factor, self.factor // 2 :: self.factor]
        return rearrange(middle, "m (h p) (w q) -> m (h w) (p q)", h=self.grid, w=self.grid)

    def per_pixel(self, cells: np.ndarray) -> np.ndarray:
        """(M, P, Q) -> (M, H, W): every label pixel gets the value of the image pixel that covers it."""
        image = rearrange(cells, "m (h w) (p q) -> m (h p) (w q)", h=self.grid, p=self.side)
        return repeat(image, "m h w -> m (h a) (w b)", a=self.factor, b=self.factor)

    def assemble(self, crops: np.ndarray) -> np.ndarray:
        """(num_crops, H, W) -> the map of their tile; where crops overlap, the later one counts."""
        tile = np.empty((self.tile_pixels, self.tile_pixels), crops.dtype)
        for number, crop in enumerate(crops):
            self.crop_grid.cut(tile, self.crop_grid.tiling(number), self.resolution_m)[...] = crop
        return tile


def confusions(
    layout: PixelLayout, num_classes: int, predicted: np.ndarray, split: FeatureCache
) -> np.ndarray:
    """(tiles, C + 1, C) int64 of predictions (M, P, Q): each pixel of each tile once, by (target, predicted) class.

    Row C counts the ignored pixels. Crops are put together before counting, so overlaps are not counted twice.
    """
    per_tile = layout.crop_grid.num_crops
    counts = []
    for first in range(0, len(split), per_tile):
        tile_map = layout.assemble(layout.per_pixel(predicted[first : first + per_tile]))
        truth = layout.assemble(split.labels[first : first + per_tile])
        counts.append(tile_confusion(num_classes, tile_map, truth))
    return np.stack(counts)


def tile_confusion(num_classes: int, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(C + 1, C) int64 of a tile's map and labels (H, W), by (target, predicted) class; row C: ignored pixels."""
    truth = np.where(truth == IGNORED, num_classes, truth)
    return confusion(predicted, truth, num_classes + 1)[:, :num_classes]


def knn(
    layout: PixelLayout,
    num_classes: int,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device = CPU,
) -> tuple[np.ndarray, dict[str, float]]:
    """Predictions (M, P, Q) uint8 from the labels of the nearest cells, pixel by pixel, weighted by
    exp(cosine / temperature), and the hyperparameters.

    k and the temperature are those with the best validation mIoU; the first wins a tie. Of more than ``BANK_CELLS``
    training cells a sample is used, drawn from ``seed``.
    """
    rows = sample_cells(labelled_cells(_counted(layout, train), "training"), BANK_CELLS, seed)
    bank = unit_vectors(take_cells(train.features, rows), device)
    labels = to_device(take_cells(layout.per_cell(np.asarray(train.labels)), rows), device).long()
    selection = sample_cells(labelled_cells(_counted(layout, val), "validation"), SELECTION_CELLS, seed + 1)
    truth = take_cells(layout.per_cell(np.asarray(val.labels)), selection)
    ks = sorted({min(k, len(bank)) for k in NEIGHBOURS})
    counts = {(k, t): np.zeros((num_classes, num_classes), np.int64) for k in ks for t in TEMPERATURES}
    for piece in np.array_split(np.arange(len(truth)), -(-len(truth) // CHUNK_CELLS)):
        near = torch.topk(
            unit_vectors(take_cells(val.features, selection[piece]), device) @ bank.T, ks[-1], dim=1
        )
        for k, t in counts:
            votes = _vote(near.values[:, :k] / t, labels[near.indices[:, :k]], num_classes)
            counts[k, t] += confusion(votes, truth[piece], num_classes, ignored=(IGNORED,))
    k, t = list(counts)[best_index([float(mean_iou(c)) for c in counts.values()])]
    predicted = []
    for features in feature_chunks(test.features):
        near = torch.topk(unit_vectors(features, device) @ bank.T, k, dim=1)
        predicted.append(_vote(near.values / t, labels[near.indices], num_classes))
    return as_crops(predicted, test), {"k": k, "temperature": t}


def probe(
    layout: PixelLayout,
    num_classes: int,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device = CPU,
    class_weights: Sequence[float] | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """Predictions (M, P, Q) uint8 of a linear map F → Q·C per cell, on standardised features, and the hyperparameters.

    One map per learning rate, all trained in the same pass (AdamW, one-cycle cosine, cross-entropy over the pixels that
    count); the one with the best validation mIoU is used. The order of the batches is drawn from ``seed``.
    ``class_weights``: (C,) of the cross-entropy, which then is a weighted mean.
    """
    rows = labelled_cells(_counted(layout, train), "training")
    labels = layout.per_cell(np.asarray(train.labels))
    mean, scale = feature_moments(train.features)
    maps = LinearMaps(train.features.shape[-1], layout.side**2 * num_classes, mean, scale, device)
    weight = None if class_weights is None else torch.tensor(class_weights, device=device)

    def backward(piece: np.ndarray) -> None:
        truth = to_device(take_cells(labels, piece), device).long()
        losses = [
            F.cross_entropy(
                logits.view(-1, num_classes), truth.flatten(), weight, ignore_index=IGNORED, reduction="mean"
            )
            for logits in maps.outputs(take_cells(train.features, piece))
        ]
        torch.stack(losses).sum().backward()  # each map's gradient is that of its own loss

    def best_class(logits: Tensor) -> np.ndarray:
        return logits.view(len(logits), -1, num_classes).argmax(-1).byte().cpu().numpy()

    learners = zip(maps.weights, maps.biases, strict=True)
    lr_grid_search(list(learners), LEARNING_RATES, rows, BATCH_CELLS, seed, backward)
    counts = [confusions(layout, num_classes, p, val).sum(0) for p in maps.predict(val, best_class)]
    chosen = best_index([float(mean_iou(c[:num_classes])) for c in counts])
    return maps.predict(test, best_class, only=chosen)[0], {"lr": LEARNING_RATES[chosen]}


class LinearMaps:
    """A linear map F → outputs per learning rate, over the same standardised features, from zero weights."""

    def __init__(
        self, width: int, outputs: int, mean: np.ndarray, scale: np.ndarray, device: torch.device
    ) -> None:
        self._mean, self._scale = (torch.from_numpy(a).float().to(device) for a in (mean, scale))

        def zeros(*shape: int) -> list[Tensor]:
            return [torch.zeros(*shape, device=device, requires_grad=True) for _ in LEARNING_RATES]

        self.weights, self.biases = zeros(width, outputs), zeros(outputs)

    def outputs(self, features: np.ndarray) -> list[Tensor]:
        """(n, outputs) of every map, of features (n, F)."""
        x = self._standardise(features)
        return [x @ w + b for w, b in zip(self.weights, self.biases, strict=True)]

    @torch.no_grad()
    def predict(
        self, split: FeatureCache, decide: Callable[[Tensor], np.ndarray], only: int | None = None
    ) -> list[np.ndarray]:
        """(M, P, Q) of every map, or of one; ``decide``: outputs of n cells to predictions (n, Q)."""
        maps = range(len(self.weights)) if only is None else [only]
        parts: list[list[np.ndarray]] = [[] for _ in maps]
        for features in feature_chunks(split.features):
            x = self._standardise(features)
            for part, i in zip(parts, maps, strict=True):
                part.append(decide(x @ self.weights[i] + self.biases[i]))
        return [as_crops(part, split) for part in parts]

    def _standardise(self, features: np.ndarray) -> Tensor:
        return (to_device(features.astype(np.float32), self._mean.device) - self._mean) / self._scale


def _counted(layout: PixelLayout, split: FeatureCache) -> np.ndarray:
    """(M, P, Q) bool: whether the label of a pixel counts."""
    return layout.per_cell(np.asarray(split.labels)) != IGNORED


def labelled_cells(counted: np.ndarray, which: str) -> np.ndarray:
    """Numbers of the cells, among all M·P, with a pixel that counts (M, P, Q). EvaluationError if there is none."""
    rows = np.flatnonzero(counted.any(-1))
    if not len(rows):
        raise EvaluationError(f"no pixel of the {which} split counts: every label is ignored or missing")
    return rows


def sample_cells(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` of these rows, drawn from ``seed``; ascending."""
    if len(rows) <= most:
        return rows
    return np.sort(
        np.random.Generator(np.random.Philox(key=[seed, _SAMPLE_STREAM])).choice(rows, most, replace=False)
    )


def take_cells(crops: FeatureArray, cells: np.ndarray) -> np.ndarray:
    """(n, …): cells by number, among all M·P, of (M, P, …)."""
    return crops[np.divmod(cells, crops.shape[1])]


def feature_chunks(features: FeatureArray) -> Iterator[np.ndarray]:
    """(n, F) features of all cells in order, a few crops at a time."""
    crops = max(CHUNK_CELLS // features.shape[1], 1)
    for first in range(0, len(features), crops):
        yield np.asarray(features[first : first + crops]).reshape(-1, features.shape[-1])


def as_crops(parts: list[np.ndarray], split: FeatureCache) -> np.ndarray:
    """(M, P, Q) from the predictions (n, Q) of consecutive chunks."""
    return np.concatenate(parts).reshape(len(split), -1, parts[0].shape[-1])


def unit_vectors(features: np.ndarray, device: torch.device) -> Tensor:
    """Features (n, F) at length 1, in fp32."""
    return F.normalize(to_device(np.asarray(features, np.float32), device), dim=1)


def _vote(weights: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """(n, k) log-weights and (n, k, Q) labels -> (n, Q) uint8; a neighbour has no vote where its label is ignored.

    Ignored labels vote for class C, which is cut off: the loop needs no mask and memory does not grow with k.
    """
    votes = torch.zeros(len(labels), labels.shape[2], num_classes + 1, device=labels.device)
    shares = torch.softmax(weights, dim=1)
    for share, label in zip(shares.unbind(1), labels.unbind(1), strict=True):
        votes.scatter_add_(
            2, label.clamp_max(num_classes)[..., None], share[:, None, None].expand(-1, labels.shape[2], 1)
        )
    return votes[..., :num_classes].argmax(-1).byte().cpu().numpy()


def feature_moments(features: FeatureArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale (F,) over all cells, in float64 and one pass, as the features may be larger than memory.

    A feature that is constant in training has scale inf, which drops it.
    """
    total, squares, count = np.zeros(features.shape[-1]), np.zeros(features.shape[-1]), 0
    for chunk in feature_chunks(features):
        wide = chunk.astype(np.float64)
        total, squares, count = total + wide.sum(0), squares + (wide**2).sum(0), count + len(wide)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    floor = 1e-4 * max(float(deviation.max()), 1e-12)
    return mean, np.where(deviation > floor, deviation, np.inf)

"""Frozen features per place against labels per pixel: nearest neighbours and a linear map, for segmentation.

A place is a token of the reference grid; it answers for side×side pixels of the model's image, and each of those for
factor×factor pixels of the labels. Shapes: M crops, P = grid² places, Q = side² pixels each, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.metrics import best_index, confusion, mean_iou
from maestro_scale.evaluation.probes.lr_grid import lr_grid_search
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.stream.crops import CropGrid

IGNORED = 255
CPU = torch.device("cpu")

NEIGHBOURS = (5, 10, 20, 50)
TEMPERATURES = (0.03, 0.07, 0.2)
BANK_CELLS = 100_000  # training places that kNN compares with
SELECTION_CELLS = 20_000  # validation places that k and the temperature are chosen on

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCH_CELLS = 1024

_CHUNK = 2048  # places that are compared, or predicted, at once


@dataclass(frozen=True)
class PixelLayout:
    """How places, pixels and labels lie on each other in a crop, and the crops on their tile."""

    grid: int
    side: int
    resolution_m: float
    crop_grid: CropGrid

    def __post_init__(self) -> None:
        if self.crop_pixels % (self.grid * self.side):
            raise ValueError(
                f"labels of {self.crop_pixels} pixels per side are no multiple of image_size "
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

    def per_cell(self, labels: np.ndarray) -> np.ndarray:
        """(M, H, W) -> (M, P, Q): of each block of factor×factor labels the middle one."""
        middle = labels[:, self.factor // 2 :: self.factor, self.factor // 2 :: self.factor]
        return rearrange(middle, "m (h p) (w q) -> m (h w) (p q)", h=self.grid, w=self.grid)

    def per_pixel(self, places: np.ndarray) -> np.ndarray:
        """(M, P, Q) -> (M, H, W): every label pixel gets the answer of the pixel that covers it."""
        image = rearrange(places, "m (h w) (p q) -> m (h p) (w q)", h=self.grid, p=self.side)
        return repeat(image, "m h w -> m (h a) (w b)", a=self.factor, b=self.factor)

    def assemble(self, crops: np.ndarray) -> np.ndarray:
        """(num_crops, H, W) -> the tile's map; where crops overlap the later one is seen."""
        tile = np.empty((self.tile_pixels, self.tile_pixels), crops.dtype)
        for number, crop in enumerate(crops):
            self.crop_grid.cut(tile, self.crop_grid.tiling(number), self.resolution_m)[...] = crop
        return tile


def confusions(
    layout: PixelLayout, num_classes: int, predicted: np.ndarray, split: FeatureCache
) -> np.ndarray:
    """(tiles, C + 1, C) int64 of predictions (M, P, Q): each pixel of each tile once, by (target, predicted) class.

    Row C is of the pixels that are ignored.
    """
    per_tile = layout.crop_grid.num_crops
    counts = []
    for first in range(0, len(split), per_tile):
        answer = layout.assemble(layout.per_pixel(predicted[first : first + per_tile]))
        truth = layout.assemble(split.labels[first : first + per_tile])
        counts.append(tile_confusion(num_classes, answer, truth))
    return np.stack(counts)


def tile_confusion(num_classes: int, answer: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(C + 1, C) int64 of a tile's map and labels (H, W), by (target, predicted) class; row C: ignored pixels."""
    truth = np.where(truth == IGNORED, num_classes, truth)
    return confusion(answer, truth, num_classes + 1)[:, :num_classes]


def knn(
    layout: PixelLayout,
    num_classes: int,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device = CPU,
) -> tuple[np.ndarray, dict[str, float]]:
    """Answers (M, P, Q) uint8 by the neighbours' labels, pixel by pixel, weighted by exp(cosine / temperature).

    k and the temperature are the best on validation mIoU; the first wins a tie. Of more than ``BANK_CELLS`` training
    places a sample is used, drawn from ``seed``.
    """
    rows = _sample(_labelled_cells(layout, train, "training"), BANK_CELLS, seed)
    bank = _unit(_take_cells(train.features, rows), device)
    labels = torch.from_numpy(_take_cells(layout.per_cell(np.asarray(train.labels)), rows)).long().to(device)
    chosen_on = _sample(_labelled_cells(layout, val, "validation"), SELECTION_CELLS, seed + 1)
    truth = _take_cells(layout.per_cell(np.asarray(val.labels)), chosen_on)
    ks = sorted({min(k, len(bank)) for k in NEIGHBOURS})
    counts = {(k, t): np.zeros((num_classes, num_classes), np.int64) for k in ks for t in TEMPERATURES}
    for piece in np.array_split(np.arange(len(truth)), -(-len(truth) // _CHUNK)):
        near = torch.topk(_unit(_take_cells(val.features, chosen_on[piece]), device) @ bank.T, ks[-1], dim=1)
        for k, t in counts:
            answer = _vote(near.values[:, :k] / t, labels[near.indices[:, :k]], num_classes)
            counts[k, t] += confusion(answer, truth[piece], num_classes, ignored=(IGNORED,))
    k, t = list(counts)[best_index([float(mean_iou(c)) for c in counts.values()])]
    answers = []
    for features in _chunks(test.features):
        near = torch.topk(_unit(features, device) @ bank.T, k, dim=1)
        answers.append(_vote(near.values / t, labels[near.indices], num_classes))
    return _as_crops(answers, test), {"k": k, "temperature": t}


def probe(
    layout: PixelLayout,
    num_classes: int,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device = CPU,
) -> tuple[np.ndarray, dict[str, float]]:
    """Answers (M, P, Q) uint8 of a linear map F → Q·C per place, on standardised features.

    One map per learning rate, all trained in the same pass (AdamW, one-cycle cosine, cross-entropy over the pixels that
    count); the best on validation mIoU answers. Order and start are drawn from ``seed``.
    """
    rows = _labelled_cells(layout, train, "training")
    labels = layout.per_cell(np.asarray(train.labels))
    mean, scale = _moments(train.features)
    maps = _LinearMaps(train.features.shape[-1], layout.side**2, num_classes, mean, scale, device)

    def backward(piece: np.ndarray) -> None:
        truth = torch.from_numpy(_take_cells(labels, piece)).long().to(device)
        maps.loss(_take_cells(train.features, piece), truth).backward()

    learners = zip(maps.weights, maps.biases, strict=True)
    lr_grid_search(list(learners), LEARNING_RATES, rows, BATCH_CELLS, seed, backward)
    counts = [confusions(layout, num_classes, p, val).sum(0) for p in maps.answers(val)]
    chosen = best_index([float(mean_iou(c[:num_classes])) for c in counts])
    return maps.answers(test, only=chosen)[0], {"lr": LEARNING_RATES[chosen]}


class _LinearMaps:
    """A linear map per learning rate over the same standardised features."""

    def __init__(
        self,
        width: int,
        pixels: int,
        classes: int,
        mean: np.ndarray,
        scale: np.ndarray,
        device: torch.device,
    ) -> None:
        self.pixels, self.classes = pixels, classes
        self._mean, self._scale = (torch.from_numpy(a).float().to(device) for a in (mean, scale))

        def zeros(*shape: int) -> list[Tensor]:
            return [torch.zeros(*shape, device=device, requires_grad=True) for _ in LEARNING_RATES]

        self.weights, self.biases = zeros(width, pixels * classes), zeros(pixels * classes)

    def loss(self, features: np.ndarray, truth: Tensor) -> Tensor:
        """The sum over maps of the mean cross-entropy of (n, F) against (n, Q)."""
        x = self._standard(features)
        return sum(
            F.cross_entropy(
                (x @ w + b).view(-1, self.classes), truth.flatten(), ignore_index=IGNORED, reduction="mean"
            )
            for w, b in zip(self.weights, self.biases, strict=True)
        )

    @torch.no_grad()
    def answers(self, split: FeatureCache, only: int | None = None) -> list[np.ndarray]:
        """(M, P, Q) uint8 of every map, or of one."""
        wanted = range(len(self.weights)) if only is None else [only]
        parts: list[list[np.ndarray]] = [[] for _ in wanted]
        for features in _chunks(split.features):
            x = self._standard(features)
            for part, i in zip(parts, wanted, strict=True):
                logits = (x @ self.weights[i] + self.biases[i]).view(len(x), self.pixels, self.classes)
                part.append(logits.argmax(-1).byte().cpu().numpy())
        return [_as_crops(part, split) for part in parts]

    def _standard(self, features: np.ndarray) -> Tensor:
        return (torch.from_numpy(features.astype(np.float32)).to(self._mean) - self._mean) / self._scale


def _labelled_cells(layout: PixelLayout, split: FeatureCache, which: str) -> np.ndarray:
    """Numbers of the places, among all M·P, with a pixel that counts. ResultsError if there is none."""
    rows = np.flatnonzero((layout.per_cell(np.asarray(split.labels)) != IGNORED).any(-1))
    if not len(rows):
        raise ResultsError(f"not a pixel of the {which} split counts: every label is ignored")
    return rows


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return np.sort(np.random.Generator(np.random.Philox(key=[seed, 1])).choice(rows, most, replace=False))


def _take_cells(crops: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows, among all M·P, of (M, P, …)."""
    return crops[np.divmod(rows, crops.shape[1])]


def _chunks(features: np.ndarray) -> Iterator[np.ndarray]:
    crops = max(_CHUNK // features.shape[1], 1)
    for first in range(0, len(features), crops):
        yield np.asarray(features[first : first + crops]).reshape(-1, features.shape[-1])


def _as_crops(parts: list[np.ndarray], split: FeatureCache) -> np.ndarray:
    return np.concatenate(parts).reshape(len(split), -1, parts[0].shape[-1])


def _unit(features: np.ndarray, device: torch.device) -> Tensor:
    return F.normalize(torch.from_numpy(np.asarray(features, np.float32)).to(device), dim=1)


def _vote(weights: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """(n, k) log-weights and (n, k, Q) labels -> (n, Q) uint8; a neighbour has no vote where its label is ignored."""
    votes = torch.zeros(len(labels), labels.shape[2], num_classes + 1, device=labels.device)
    shares = torch.softmax(weights, dim=1)
    for share, label in zip(shares.unbind(1), labels.unbind(1), strict=True):
        votes.scatter_add_(
            2, label.clamp_max(num_classes)[..., None], share[:, None, None].expand(-1, labels.shape[2], 1)
        )
    return votes[..., :num_classes].argmax(-1).byte().cpu().numpy()


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total, squares, count = 0.0, 0.0, 0
    for chunk in _chunks(features):
        wide = chunk.astype(np.float64)
        total, squares, count = total + wide.sum(0), squares + (wide**2).sum(0), count + len(wide)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    floor = 1e-4 * max(float(deviation.max()), 1e-12)
    return mean, np.where(deviation > floor, deviation, np.inf)

"""Maps of numbers by probes on frozen features, one vector per cell of the reference grid: kNN and a linear map.

Shapes as in :mod:`.dense`. Labels are (M, H, W) float32, NaN where missing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.on_device import to_device
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.probes.dense import (
    BANK_CELLS,
    BATCH_CELLS,
    CHUNK_CELLS,
    LEARNING_RATES,
    NEIGHBOURS,
    SELECTION_CELLS,
    TEMPERATURES,
    LinearMaps,
    PixelLayout,
    as_crops,
    feature_chunks,
    feature_moments,
    labelled_cells,
    sample_cells,
    take_cells,
    unit_vectors,
)
from maestro_scale.evaluation.probes.lr_grid import lr_grid_search
from maestro_scale.evaluation.regression_metrics import NUM_SUMS, rmse, tile_sums

CPU = torch.device("cpu")


def tile_map_sums(layout: PixelLayout, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(tiles, 6) sums (``regression_metrics.tile_sums``) of predictions (M, P, Q) and labels (M, H, W): each pixel of
    each tile once, as crops are put together before."""
    per_tile = layout.crop_grid.num_crops
    sums = [np.zeros((0, NUM_SUMS))]
    for first in range(0, len(labels), per_tile):
        part = slice(first, first + per_tile)
        tile_map = layout.assemble(layout.per_pixel(predicted[part]))
        sums.append(tile_sums(tile_map[None], layout.assemble(labels[part])[None]))
    return np.concatenate(sums)


def knn(
    layout: PixelLayout,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device = CPU,
) -> tuple[np.ndarray, dict[str, float]]:
    """Predictions (M, P, Q) float32: per pixel the mean of the labels of the nearest cells, weighted by
    exp(cosine / temperature), and the hyperparameters, those with the lowest validation RMSE.

    A neighbour without a label of the pixel has no weight; where no neighbour has one, the training mean is predicted.
    """
    labels = layout.per_cell(np.asarray(train.labels))
    rows = sample_cells(labelled_cells(~np.isnan(labels), "training"), BANK_CELLS, seed)
    bank = unit_vectors(take_cells(train.features, rows), device)
    numbers = take_cells(labels, rows)
    mean = float(np.nanmean(numbers, dtype=np.float64))
    centred = to_device((numbers - mean).astype(np.float32), device)
    truth = layout.per_cell(np.asarray(val.labels))
    selection = sample_cells(labelled_cells(~np.isnan(truth), "validation"), SELECTION_CELLS, seed + 1)
    ks = sorted({min(k, len(bank)) for k in NEIGHBOURS})
    candidates = [(k, t) for k in ks for t in TEMPERATURES]
    sums = np.zeros((len(candidates), NUM_SUMS))

    def predict(similarity: Tensor, nearest: Tensor, k: int, temperature: float) -> np.ndarray:
        return _weighted_mean(similarity[:, :k] / temperature, centred[nearest[:, :k]]).cpu().numpy() + mean

    for piece in np.array_split(selection, -(-len(selection) // CHUNK_CELLS)):
        near = torch.topk(unit_vectors(take_cells(val.features, piece), device) @ bank.T, ks[-1], dim=1)
        for i, (k, t) in enumerate(candidates):
            found = predict(near.values, near.indices, k, t)
            sums[i] += tile_sums(found, take_cells(truth, piece)).sum(axis=0)
    k, temperature = candidates[best_index([float(score) for score in rmse(sums)], sign=-1)]
    predicted = []
    for chunk in feature_chunks(test.features):
        near = torch.topk(unit_vectors(chunk, device) @ bank.T, k, dim=1)
        predicted.append(predict(near.values, near.indices, k, temperature).astype(np.float32))
    return as_crops(predicted, test), {"k": k, "temperature": temperature}


def probe(
    layout: PixelLayout,
    train: FeatureCache,
    val: FeatureCache,
    test: FeatureCache,
    seed: int,
    device: torch.device = CPU,
) -> tuple[np.ndarray, dict[str, float]]:
    """Predictions (M, P, Q) float32 of a linear map F → Q per cell, on standardised features and labels, and the
    hyperparameters.

    One map per learning rate, all trained in the same pass on the squared error of the pixels that have a label; the
    one with the lowest validation RMSE is used. The order of the batches is drawn from ``seed``.
    """
    labels = layout.per_cell(np.asarray(train.labels))
    rows = labelled_cells(~np.isnan(labels), "training")
    centre, deviation = (
        float(np.nanmean(labels, dtype=np.float64)),
        float(np.nanstd(labels, dtype=np.float64)),
    )
    deviation = deviation or 1.0
    mean, scale = feature_moments(train.features)
    maps = LinearMaps(train.features.shape[-1], layout.side**2, mean, scale, device)

    def backward(piece: np.ndarray) -> None:
        truth = to_device(((take_cells(labels, piece) - centre) / deviation).astype(np.float32), device)
        counted = ~torch.isnan(truth)
        wanted = torch.where(counted, truth, 0.0)
        losses = [
            torch.where(counted, output - wanted, 0.0).square().sum() / counted.sum()
            for output in maps.outputs(take_cells(train.features, piece))
        ]
        torch.stack(losses).sum().backward()  # each map's gradient is that of its own loss

    def in_units(output: Tensor) -> np.ndarray:
        return output.cpu().numpy() * np.float32(deviation) + np.float32(centre)

    learners = zip(maps.weights, maps.biases, strict=True)
    lr_grid_search(list(learners), LEARNING_RATES, rows, BATCH_CELLS, seed, backward)
    sums = [tile_map_sums(layout, p, val.labels).sum(axis=0) for p in maps.predict(val, in_units)]
    chosen = best_index([float(rmse(s)) for s in sums], sign=-1)
    return maps.predict(test, in_units, only=chosen)[0], {"lr": LEARNING_RATES[chosen]}


def _weighted_mean(weights: Tensor, numbers: Tensor) -> Tensor:
    """(n, k) log-weights and (n, k, Q) numbers, NaN where missing -> (n, Q); 0 where all are missing."""
    share = torch.softmax(weights, dim=1)[..., None] * ~torch.isnan(numbers)
    return (share * torch.nan_to_num(numbers)).sum(dim=1) / share.sum(dim=1).clamp_min(1e-12)

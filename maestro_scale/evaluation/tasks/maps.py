"""Features per cell of the reference grid, and maps of whole tiles from predictions of their crops.

Shapes: B crops, M crops of a split, P cells, Q pixels each (see ``probes.dense``), F features, H×W label pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.evaluation.baselines.baseline import FrozenEncoder
from maestro_scale.evaluation.features.missing import filled
from maestro_scale.evaluation.probes.dense import PixelLayout
from maestro_scale.evaluation.tasks.protocol import NUM_MAPS
from maestro_scale.stream.batch import Batch


def cell_features(model: FrozenEncoder, batch: Batch, grid: int) -> Tensor:
    """(B, P, F = S·E): per cell the mean over dates of each sensor's tokens, concatenated over sensors."""
    cells = {name: resample_tokens(t.mean(dim=1), grid) for name, t in model.encode(batch).items()}
    return torch.cat(list(filled(model, batch, cells).values()), dim=-1)


def resample_tokens(tokens: Tensor, grid: int) -> Tensor:
    """(B, L, E) -> (B, grid², E): bilinear interpolation where the sensor has another grid than the reference."""
    side = round(tokens.shape[1] ** 0.5)
    if side == grid:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(-1, (side, side))
    return F.interpolate(maps, size=(grid, grid), mode="bilinear").flatten(2).transpose(1, 2)


def first_tiles(layout: PixelLayout, crops: np.ndarray) -> np.ndarray:
    """(n, H, W): the first few tiles, assembled from crops (M, h, w)."""
    per_tile = layout.crop_grid.num_crops
    firsts = range(0, min(len(crops), NUM_MAPS * per_tile), per_tile)
    return np.stack([layout.assemble(crops[first : first + per_tile]) for first in firsts])


def tile_maps(layout: PixelLayout, predicted: np.ndarray) -> Iterator[np.ndarray]:
    """(H, W) of each tile, assembled from predictions (M, P, Q) of its crops."""
    per_tile = layout.crop_grid.num_crops
    for first in range(0, len(predicted), per_tile):
        yield layout.assemble(layout.per_pixel(predicted[first : first + per_tile]))

"""Heads for downstream tasks: pooling of the encoded tokens, then one linear layer.

Shapes: B batch, R token grids per sensor, L tokens per grid, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale.datasets.spec import Sensor, Target

POOL_HEADS = 8


class AttentivePool(nn.Module):
    """Attention pooling with one learned query (8 heads); LayerNorm before and after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.empty(width))
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, E) -> (B, E)."""
        k, v = self.to_kv(self.norm(tokens)).unflatten(-1, (2, POOL_HEADS, -1)).permute(2, 0, 3, 1, 4)
        q = self.query.view(1, POOL_HEADS, 1, -1).expand(len(tokens), -1, -1, -1)
        return self.norm_out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class MeanPool(nn.Module):
    """The mean of the tokens, then LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, E) -> (B, E)."""
        return self.norm_out(tokens.mean(dim=1))


POOLS: dict[str, type[AttentivePool] | type[MeanPool]] = {"attentive": AttentivePool, "mean": MeanPool}


class ClassificationHead(nn.Module):
    """Class logits from one pooling over all tokens of all sensors."""

    def __init__(self, target: Target, width: int, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.linear = nn.Linear(width, len(target.classes))

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """{sensor: (B, R, L, E)} -> (B, classes)."""
        return self.linear(self.pool(torch.cat([t.flatten(1, 2) for t in tokens.values()], dim=1)))


class SegmentationHead(nn.Module):
    """Pixel logits: pools over all sensors and dates at each cell of the reference sensor's grid."""

    def __init__(self, target: Target, width: int, pool: nn.Module, grid: int, pixels_per_token: int) -> None:
        super().__init__()
        self.pool = pool
        self.grid, self.side = grid, pixels_per_token
        self.linear = nn.Linear(width, pixels_per_token**2 * target.num_outputs)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """{sensor: (B, R, L, E)} -> (B, classes, grid*side, grid*side)."""
        cells = torch.cat([self._resize(t) for t in tokens.values()], dim=2)  # (B, grid*grid, R_all, E)
        pooled = self.pool(cells.flatten(0, 1))
        logits = self.linear(pooled).view(len(cells), self.grid, self.grid, self.side, self.side, -1)
        return logits.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _resize(self, tokens: Tensor) -> Tensor:
        """(B, R, L, E) -> (B, grid*grid, R, E), bilinear."""
        grid = round(tokens.shape[2] ** 0.5)
        maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(-1, (grid, grid))
        if grid != self.grid:
            maps = F.interpolate(maps, size=(self.grid, self.grid), mode="bilinear")
        return maps.flatten(2).unflatten(0, tokens.shape[:2]).permute(0, 3, 1, 2)


def build_head(target: Target, width: int, pool: str, ref: Sensor | None, side: int) -> nn.Module:
    """The head of a target. ``pool``: a key of ``POOLS``; ``ref``: the sensor whose token grid a segmentation is
    predicted on, ``side``: pixels per side of each token."""
    pooling = POOLS[pool](width)
    if target.kind == "multilabel":
        return ClassificationHead(target, width, pooling)
    assert ref is not None  # ModelConfig requires a reference sensor for segmentation
    return SegmentationHead(target, width, pooling, ref.grid, side)

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
    """Class logits, or the one value of a regression, from one pooling over all tokens of all sensors."""

    def __init__(self, target: Target, width: int, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        # A multilabel head predicts the ignored classes too: its number of outputs is part of published checkpoints.
        outputs = len(target.classes) if target.kind == "multilabel" else target.num_outputs
        self.linear = nn.Linear(width, outputs)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """{sensor: (B, R, L, E)} -> (B, classes)."""
        return self.linear(self.pool(torch.cat([t.flatten(1, 2) for t in tokens.values()], dim=1)))


class SegmentationHead(nn.Module):
    """Logits (or values) of pixels: pools over all sensors and dates at each cell of the reference sensor's grid."""

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


class _Standardised(nn.Module):
    """Mean and deviation of a regression target, for heads that predict (value - mean) / deviation.

    They are buffers, so that a stored head contains them; 0 and 1 until :meth:`set_scale`. Outputs stay standardised
    where they are trained: in bf16 a large mean would round away the differences that the loss measures.
    """

    mean: Tensor
    deviation: Tensor

    def _register_scale(self) -> None:
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    @torch.no_grad()
    def set_scale(self, mean: float, deviation: float) -> None:
        """Set mean and deviation of the labels that the head is trained on."""
        self.mean.fill_(mean)
        self.deviation.fill_(deviation)

    def in_units(self, output: Tensor) -> Tensor:
        """Outputs in the units of the target, in fp32."""
        return output.float() * self.deviation.float() + self.mean.float()


class RegressionHead(_Standardised, ClassificationHead):
    """One standardised value per tile, (B, 1); see ``in_units``."""

    def __init__(self, target: Target, width: int, pool: nn.Module) -> None:
        super().__init__(target, width, pool)
        self._register_scale()


class RegressionMapHead(_Standardised, SegmentationHead):
    """One standardised value per pixel, (B, 1, H, W); see ``in_units``."""

    def __init__(self, target: Target, width: int, pool: nn.Module, grid: int, pixels_per_token: int) -> None:
        super().__init__(target, width, pool, grid, pixels_per_token)
        self._register_scale()


def build_head(target: Target, width: int, pool: str, ref: Sensor | None, side: int) -> nn.Module:
    """The head of a target. ``pool``: a key of ``POOLS``; ``ref``: the sensor whose token grid a map is predicted on,
    ``side``: pixels per side of each token."""
    pooling = POOLS[pool](width)
    is_number = target.kind == "regression"
    if not target.is_map:
        return (RegressionHead if is_number else ClassificationHead)(target, width, pooling)
    assert ref is not None  # ModelConfig requires a reference sensor for a map
    return (RegressionMapHead if is_number else SegmentationHead)(target, width, pooling, ref.grid, side)

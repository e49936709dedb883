"""Heads for downstream tasks: pooling of the encoded tokens, then one linear layer. ``decoders.py`` has the others.

Shapes: B batch, R token grids per sensor, L tokens per grid, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale.datasets.spec import Target

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
        q = self.query.view(1, POOL_HEADS, 1, -1).expand(tokens.shape[0], -1, -1, -1)
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


def num_outputs(target: Target) -> int:
    """Outputs of a head. A multilabel head predicts the ignored classes too: its number of outputs is part of published
    checkpoints."""
    return len(target.classes) if target.kind == "multilabel" else target.num_outputs


class ClassificationHead(nn.Module):
    """Class logits, or the one value of a regression, from one pooling over all tokens of all sensors."""

    def __init__(self, target: Target, width: int, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.linear = nn.Linear(width, num_outputs(target))

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
        logits = self.linear(self.pool(tokens_by_cell(tokens, self.grid).flatten(0, 1)))
        return pixels_of_cells(logits.unflatten(0, (-1, self.grid**2)), self.grid, self.side)


def tokens_by_cell(tokens: dict[str, Tensor], grid: int) -> Tensor:
    """{sensor: (B, R, L, E)} -> (B, grid*grid, R of all sensors, E): bilinear where a sensor has another grid."""
    return torch.cat([resize_tokens(t, grid) for t in tokens.values()], dim=2)


def resize_tokens(tokens: Tensor, grid: int) -> Tensor:
    """(B, R, L, E) -> (B, grid*grid, R, E), bilinear."""
    side = round(tokens.shape[2] ** 0.5)
    maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(-1, (side, side))
    if side != grid:
        maps = F.interpolate(maps, size=(grid, grid), mode="bilinear")
    return maps.flatten(2).unflatten(0, tokens.shape[:2]).permute(0, 3, 1, 2)


def pixels_of_cells(values: Tensor, grid: int, side: int) -> Tensor:
    """(B, grid*grid, side*side*C), pixels row by row -> (B, C, grid*side, grid*side)."""
    pixels = values.view(values.shape[0], grid, grid, side, side, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Standardised(nn.Module):
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


class RegressionHead(Standardised, ClassificationHead):
    """One standardised value per tile, (B, 1); see ``in_units``."""

    def __init__(self, target: Target, width: int, pool: nn.Module) -> None:
        super().__init__(target, width, pool)
        self._register_scale()


class RegressionMapHead(Standardised, SegmentationHead):
    """One standardised value per pixel, (B, 1, H, W); see ``in_units``."""

    def __init__(self, target: Target, width: int, pool: nn.Module, grid: int, pixels_per_token: int) -> None:
        super().__init__(target, width, pool, grid, pixels_per_token)
        self._register_scale()

"""Pixels to tokens and back: scaling, resizing, patches and patch embedding; mask tokens.

Shapes: B batch, D dates, C bands, HxW pixels, P patch side, L tokens per date, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.datasets.spec import Scale, Sensor


def scale(rule: Scale, pixels: Tensor) -> Tensor:
    """Raw values in any dtype -> float32 network inputs (see :class:`Scale`)."""
    pixels = pixels.float()
    if rule.kind == "log":
        pixels = pixels.clamp_min(1e-10).log()
    return pixels / rule.divisor


def network_input(sensor: Sensor, pixels: Tensor) -> Tensor:
    """(B, D, C, H, W) raw -> (B, D, C, image_size, image_size) float32: resized, scaled, elevation differenced."""
    # Nearest resizing commutes with per-pixel operations, so it runs first, on the smaller native dtype.
    x = scale(sensor.scale, _nearest(_nearest(pixels, sensor.image_size, 3), sensor.image_size, 4))
    if sensor.elevation:
        x = torch.stack([x[:, :, 0], 30.0 * (x[:, :, 0] - x[:, :, 1])], dim=2)
    return x


def _nearest(pixels: Tensor, size: int, dim: int) -> Tensor:
    """Nearest resize of one axis, in any dtype: pixel i from floor(i * old / new)."""
    old = pixels.shape[dim]
    if old == size:
        return pixels
    # F.interpolate chooses the indices, as in the authors' code: where i * old / new is an integer, its float32
    # arithmetic may give one less, and published models were trained with that.
    positions = torch.arange(old, dtype=torch.float32, device=pixels.device)
    return pixels.index_select(dim, F.interpolate(positions[None, None], size=size)[0, 0].long())


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, D, C, H, W) -> (B, D, L, P*P, C), tokens row by row, pixels (row, column) within a patch."""
    return rearrange(x, "b d c (h p) (w q) -> b d (h w) (p q) c", p=patch, q=patch)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """(B, D, L, P*P, C) -> (B, D, C, H, W), the inverse of ``patchify``."""
    grid = round(patches.shape[2] ** 0.5)
    return rearrange(patches, "b d (h w) (p q) c -> b d c (h p) (w q)", h=grid, p=patch, q=patch)


class DateNorm(nn.Module):
    """GroupNorm with one group over all tokens and channels of a date, as in the authors' code.

    Its mean and variance include the masked patches, so information about them leaks into the visible tokens, and
    embedding only the visible patches would give other values. It is kept because published checkpoints need it;
    ``norm: token`` has no leak. ``benchmarks/leak.py`` measures it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, L, E) -> (B, D, L, E)."""
        # layer_norm over tokens and channels is GroupNorm with one group, without moving the channels to the front.
        return F.layer_norm(x, x.shape[-2:], eps=1e-5) * self.weight + self.bias


class PatchEmbed(nn.Module):
    """Patch embedding of one token group: a linear layer, then DateNorm (``"group"``) or LayerNorm (``"token"``)."""

    def __init__(self, bands: int, patch: int, width: int, norm: str) -> None:
        super().__init__()
        self.proj = nn.Linear(bands * patch * patch, width)
        self.norm = DateNorm(width) if norm == "group" else nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, D, L, P*P, c) -> (B, D, L, E)."""
        # Input order (band, row, column), as in a convolution, so that published weights load by a reshape.
        return self.norm(self.proj(patches.transpose(-1, -2).flatten(-2).to(self.proj.weight.dtype)))


class MaskTokens(nn.Module):
    """Decoder inputs of masked tokens: one learned vector per token group of a sensor."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(groups, width))

    def forward(self, batch_size: int, dates: int, cells: int) -> Tensor:
        """(B, G*D, L, width), group-major."""
        return self.vectors.repeat_interleave(dates, dim=0)[None, :, None].expand(batch_size, -1, cells, -1)

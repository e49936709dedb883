"""From raw pixels to tokens: scaling, resizing, patches and their embedding; and back from tokens to pixels.

Shapes: B batch, D dates, C bands, HxW pixels, P patch side, L tokens per date, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.datasets.spec import Scale, Sensor


def scale(how: Scale, pixels: Tensor) -> Tensor:
    """Raw values in any dtype -> float32 network inputs (see :class:`Scale`)."""
    pixels = pixels.float()
    if how.kind == "log":
        pixels = pixels.clamp_min(1e-10).log()
    return pixels / how.divisor


def network_input(sensor: Sensor, pixels: Tensor) -> Tensor:
    """(B, D, C, H, W) raw -> (B, D, C, image_size, image_size) float32: resized, scaled, elevation differenced."""
    # Nearest resizing commutes with what is done to single pixels: first, it handles small native values.
    x = scale(sensor.scale, _nearest(_nearest(pixels, sensor.image_size, 3), sensor.image_size, 4))
    if sensor.elevation:
        x = torch.stack([x[:, :, 0], 30.0 * (x[:, :, 0] - x[:, :, 1])], dim=2)
    return x


def _nearest(pixels: Tensor, size: int, dim: int) -> Tensor:
    """Nearest resize of one axis, in any dtype: pixel i from floor(i * old / new)."""
    old = pixels.shape[dim]
    if old == size:
        return pixels
    # Where i * old / new is whole, F.interpolate may round it down; it picks the indices, to agree with the authors.
    places = torch.arange(old, dtype=torch.float32, device=pixels.device)
    return pixels.index_select(dim, F.interpolate(places[None, None], size=size)[0, 0].long())


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, D, C, H, W) -> (B, D, L, P*P, C), tokens row by row, pixels (row, column) within a patch."""
    return rearrange(x, "b d c (h p) (w q) -> b d (h w) (p q) c", p=patch, q=patch)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """(B, D, L, P*P, C) -> (B, D, C, H, W), the inverse of ``patchify``."""
    grid = round(patches.shape[2] ** 0.5)
    return rearrange(patches, "b d (h w) (p q) c -> b d c (h p) (w q)", h=grid, p=patch, q=patch)


class DateNorm(nn.Module):
    """GroupNorm with one group, as the authors have it: over all tokens and channels of a date.

    It mixes the patches of a date, so masked ones leak into the statistics of the visible ones.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, L, E) -> (B, D, L, E)."""
        return F.layer_norm(x, x.shape[-2:], eps=1e-5) * self.weight + self.bias


class PatchEmbed(nn.Module):
    """Patches of one token group -> tokens: a linear map, then ``norm="group"`` (DateNorm) or ``"token"``."""

    def __init__(self, bands: int, patch: int, width: int, norm: str) -> None:
        super().__init__()
        self.proj = nn.Linear(bands * patch * patch, width)
        self.norm = DateNorm(width) if norm == "group" else nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, D, L, P*P, c) -> (B, D, L, E)."""
        # The weight keeps a convolution's order (band, row, column), so that published checkpoints load by reshape.
        return self.norm(self.proj(patches.transpose(-1, -2).flatten(-2).to(self.proj.weight.dtype)))


class MaskTokens(nn.Module):
    """What stands in for hidden tokens: one learned vector per token group of a sensor."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(groups, width))

    def forward(self, batch_size: int, dates: int, cells: int) -> Tensor:
        """(B, G*D, L, width), group-major."""
        return self.vectors.repeat_interleave(dates, dim=0)[None, :, None].expand(batch_size, -1, cells, -1)

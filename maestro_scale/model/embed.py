"""Pixels to tokens and back: scaling, resizing, patches and patch embedding; mask tokens.

Shapes: B batch, D dates, C bands, HxW pixels, P patch side, L tokens per date, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.datasets.spec import Scale, Sensor
from maestro_scale.model.cast import apply_linears
from maestro_scale.model.config import ModelConfig


def scale(rule: Scale, pixels: Tensor) -> Tensor:
    """Raw values in any dtype -> float32 network inputs (see :class:`Scale`)."""
    pixels = pixels.float()
    if rule.kind == "log":
        pixels = pixels.clamp_min(1e-10).log()
    return pixels / rule.divisor


def network_input(sensor: Sensor, pixels: Tensor) -> Tensor:
    """(B, D, C, H, W) raw -> (B, D, C, image_size, image_size) float32: resized, scaled, elevation differenced."""
    return unpatchify(input_patches(sensor, pixels), sensor.patch)


def input_patches(sensor: Sensor, pixels: Tensor) -> Tensor:
    """(B, D, C, H, W) raw -> (B, D, L, P*P, C) float32: the patches of the network input.

    In memory the channels come before the pixels, as the patch embedding reads them.
    """
    # Resizing and cutting commute with per-pixel operations, so they run first, on the smaller native dtype.
    resized = _nearest(_nearest(pixels, sensor.image_size, 3), sensor.image_size, 4)
    patches = _patch_view(resized, sensor.patch)
    # One copy makes the patches contiguous and converts them.
    x = scale(
        sensor.scale,
        torch.empty_like(patches, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(patches),
    )
    if sensor.elevation:
        above, surface = x[:, :, :, :, 0], x[:, :, :, :, 1]
        x = torch.stack([above, 30.0 * (above - surface)], dim=4)
    return x.flatten(2, 3).flatten(-2).transpose(-1, -2)


def _nearest(pixels: Tensor, size: int, dim: int) -> Tensor:
    """Nearest resize of one axis, in any dtype: pixel i from floor(i * old / new)."""
    old = pixels.shape[dim]
    if old == size:
        return pixels
    # F.interpolate chooses the indices, as in the authors' code: where i * old / new is an integer, its float32
    # arithmetic may give one less, and published models were trained with that.
    positions = torch.arange(old, dtype=torch.float32, device=pixels.device)
    return pixels.index_select(dim, F.interpolate(positions[None, None], size=size)[0, 0].long())


def _patch_view(x: Tensor, patch: int) -> Tensor:
    """(B, D, C, H, W) -> (B, D, H/P, W/P, C, P, P), a view."""
    return x.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch)).permute(0, 1, 3, 5, 2, 4, 6)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, D, C, H, W) -> (B, D, L, P*P, C), tokens row by row, pixels (row, column) within a patch."""
    return _patch_view(x, patch).flatten(2, 3).flatten(-2).transpose(-1, -2)


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
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-2:], eps=1e-5), self.weight)


class PatchEmbed(nn.Module):
    """Patch embedding of one token group: a linear layer, then DateNorm (``"group"``) or LayerNorm (``"token"``)."""

    def __init__(self, bands: int, patch: int, width: int, norm: str) -> None:
        super().__init__()
        self.proj = nn.Linear(bands * patch * patch, width)
        self.norm = DateNorm(width) if norm == "group" else nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, D, L, P*P, c) -> (B, D, L, E)."""
        return embed_patches([patches], [self])[0]


def embed_patches(patches: Sequence[Tensor], embeds: Sequence[PatchEmbed]) -> list[Tensor]:
    """Each embedding of its (B, D, L, P*P, c); (B, D, L, E), in the dtype of the norms."""
    # Input order (band, row, column), as in a convolution, so that published weights load by a reshape.
    inputs = [
        x.transpose(-1, -2).flatten(-2).to(e.proj.weight.dtype) for x, e in zip(patches, embeds, strict=True)
    ]
    tokens = apply_linears(inputs, [e.proj for e in embeds])
    # Under autocast the norms are computed in fp32, whatever the device's own list of fp32 operations.
    return [e.norm(x.to(e.norm.weight.dtype)) for x, e in zip(tokens, embeds, strict=True)]


class PatchEmbeddings(nn.ModuleDict):
    """The patch embeddings of all sensors, by ``Sensor.embed``: a list of one PatchEmbed per token group.

    One module, because the parameters of all are cast together: see ``GATHER_UNITS`` in maestro.py.
    """

    def forward(self, view: ModelConfig, patches: dict[str, Tensor]) -> dict[str, Tensor]:
        """{sensor: (B, D, L, P*P, C)} -> {sensor: (B, R, L, E)}."""
        embeds = {
            s.name: [e for e in self[s.embed].children() if isinstance(e, PatchEmbed)] for s in view.sensors
        }
        parts = [p for s in view.sensors for p in patches[s.name].split(list(view.token_groups(s)), dim=-1)]
        tokens = iter(embed_patches(parts, [e for s in view.sensors for e in embeds[s.name]]))
        grids = {name: [next(tokens) for _ in modules] for name, modules in embeds.items()}
        return {name: g[0] if len(g) == 1 else torch.cat(g, dim=1) for name, g in grids.items()}


class Projections(nn.ModuleDict):
    """Linear layers (or identities) by name, whose parameters are cast together."""

    def forward(self, names: Sequence[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Each input projected by the layer of its name."""
        named = [self[name] for name in names]
        layers = [layer for layer in named if isinstance(layer, nn.Linear)]
        return apply_linears(inputs, layers) if layers else list(inputs)


class PixelProjections(nn.ModuleDict):
    """Linear layers from decoded tokens to pixels, one per token group, by ``Sensor.embed``."""

    def forward(self, names: Sequence[str], groups: Sequence[int], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Each input projected by the layer of its name and token group."""
        layers = [list(self[n].children())[i] for n, i in zip(names, groups, strict=True)]
        return apply_linears(inputs, [layer for layer in layers if isinstance(layer, nn.Linear)])


class MaskTokens(nn.Module):
    """Decoder inputs of masked tokens: one learned vector per token group of a sensor."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(groups, width))

    def forward(self) -> Tensor:
        """(G, width)."""
        # A copy, because ZeRO 3 releases the parameter after this call.
        return self.vectors.clone()

"""Presto (Tseng et al., arXiv 2304.14065): a small transformer for pixel series, with its published weights.

Own implementation, from the paper and the interface of the published weights (github.com/nasaharvest/presto, MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from maestro_scale.evaluation.baselines.protocol import JOINT, Images, SensorInput, check_options
from maestro_scale.evaluation.baselines.series import (
    MAX_STEPS,
    UNTRAINED,
    BandGroup,
    SeriesReader,
    cartesian,
    month_table,
    ndvi,
)
from maestro_scale.evaluation.baselines.transformer import (
    Block,
    initialise_linear,
    load_weights,
    read_weights,
)
from maestro_scale.evaluation.results import EvaluationError

WIDTH, _DEPTH, _HEADS = 128, 2, 8
_QUARTER = WIDTH // 4
NO_DYNAMIC_WORLD = 9  # class of a pixel without a Dynamic World class
_MAX_SERIES = 4096  # per forward pass: 0.5 GB of activations

# Reflectance is divided by 1, as the published code divides the stored 0 to 10,000 by 10,000; it shifts temperature by
# 272.15, not by 273.15.
GROUPS = (
    BandGroup("S1", ("VV", "VH"), (-25.0, -25.0), (25.0, 25.0)),
    BandGroup("S2_RGB", ("B2", "B3", "B4"), (0.0,) * 3, (1.0,) * 3),
    BandGroup("S2_Red_Edge", ("B5", "B6", "B7"), (0.0,) * 3, (1.0,) * 3),
    BandGroup("S2_NIR_10m", ("B8",), (0.0,), (1.0,)),
    BandGroup("S2_NIR_20m", ("B8A",), (0.0,), (1.0,)),
    BandGroup("S2_SWIR", ("B11", "B12"), (0.0,) * 2, (1.0,) * 2),
    BandGroup("ERA5", ("temperature_2m", "total_precipitation"), (272.15, 0.0), (35.0, 0.03)),
    BandGroup("SRTM", ("elevation", "slope"), (0.0, 0.0), (2000.0, 50.0)),
    BandGroup("NDVI", ("B8", "B4"), (0.0,) * 2, (1.0,) * 2),
)
_CHANNELS = {"SRTM": 2, "NDVI": 1}  # of the groups whose bands are not their channels one by one
_BY_NAME = {g.name: g for g in GROUPS}


class PrestoNetwork(nn.Module):
    """The encoder, with the parameter names of the published weights."""

    pos_embed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.eo_patch_embed = nn.ModuleDict(
            {g.name: nn.Linear(_CHANNELS.get(g.name, len(g.bands)), WIDTH) for g in GROUPS}
        )
        self.dw_embed = nn.Embedding(NO_DYNAMIC_WORLD + 1, WIDTH)
        self.latlon_embed = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, _HEADS, 4 * WIDTH) for _ in range(_DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.channel_embed = nn.Embedding(len(GROUPS) + 1, _QUARTER)
        self.register_buffer("pos_embed", _positions(MAX_STEPS, 2 * _QUARTER)[None])
        self.month_embed = nn.Embedding.from_pretrained(month_table(_QUARTER), freeze=True)

    def forward(
        self,
        groups: Mapping[str, Tensor],
        months: Tensor,
        xyz: Tensor,
        valid: Mapping[str, Tensor] | None = None,
        dynamic_world: Tensor | None = None,
    ) -> Tensor:
        """(N, E): the mean of all tokens, normalised.

        ``groups``: (N, T, C) by name, of SRTM (N, 1, C). ``months``: (N, T). ``xyz``: (N, 3) on the unit sphere.
        ``valid``: by name (N, T), also of ``latlon`` (N, 1) and ``dynamic_world``; a group that is not in it is valid.
        ``dynamic_world``: (N, T) classes.
        """
        valid = valid or {}
        month = self.month_embed(months)
        position = self.pos_embed[:, : months.shape[1]].expand(len(months), -1, -1)
        tokens, masks = [self.latlon_embed(xyz)[:, None]], [valid.get("latlon")]
        for number, g in enumerate(GROUPS):
            if g.name not in groups:
                continue
            x = self.eo_patch_embed[g.name](groups[g.name])
            tokens.append(x + self._encoding(number, month, position, static=g.name == "SRTM"))
            masks.append(valid.get(g.name))
        if dynamic_world is not None:
            tokens.append(self.dw_embed(dynamic_world) + self._encoding(len(GROUPS), month, position))
            masks.append(dynamic_world != NO_DYNAMIC_WORLD)
        mask = None
        if any(m is not None for m in masks):
            mask = torch.cat(
                [
                    torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if m is None else m
                    for t, m in zip(tokens, masks, strict=True)
                ],
                dim=1,
            )
        x = torch.cat(tokens, dim=1)
        for block in self.blocks:
            x = block(x, mask)
        if mask is None:
            return self.norm(x.mean(dim=1))
        weights = mask.to(x)[:, :, None]
        return self.norm((x * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1))

    def _encoding(self, channel: int, month: Tensor, position: Tensor, static: bool = False) -> Tensor:
        """(N, T, E) of month, channel group and position; of a static group (N, 1, E) without month and position."""
        if static:
            month, position = torch.zeros_like(month[:, :1]), torch.zeros_like(position[:, :1])
        group = self.channel_embed.weight[channel].expand(*month.shape[:2], -1)
        return torch.cat([month, group, position], dim=-1)


class Presto(nn.Module):
    """Presto as an external encoder: each cell of the main sensor's grid is a pixel series; R = 1, key ``JOINT``.

    Options: ``weights``: path of the published file, or ``untrained``; ``dates``: as of SeriesReader; ``cells``:
    ``patch`` (means of the sensor's patches) or ``pixel``.
    """

    width = WIDTH

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__()
        check_options(options, ("weights", "dates", "cells"))
        groups = [g for g in GROUPS if g.name != "SRTM"]
        self._reader = SeriesReader(sensors, groups, options.get("dates", "auto"))
        cells = options.get("cells", "patch")
        if cells not in ("patch", "pixel"):
            raise EvaluationError(f"cells={cells}: use patch or pixel")
        main = self._reader.main
        self._grid = main.grid if cells == "patch" else main.size
        self._extent_m = main.size * main.resolution_m
        self.network = PrestoNetwork()
        if options["weights"] == UNTRAINED:
            self.reinitialise()
        else:
            path = Path(options["weights"])
            state = read_weights(path)
            encoder = {n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")}
            load_weights(self.network, encoder or state, path, "Presto's encoder")
        elevation = self._reader.elevation
        terrain = [elevation[0].name] if elevation else []
        self.adaptation = (
            f"Presto: {self._reader.describe(sensors.values(), terrain)}; "
            f"{f'SRTM from {terrain[0]}; ' if terrain else ''}missing groups and Dynamic World are "
            f"masked; each of {self._grid}x{self._grid} cells of {self._extent_m / self._grid:g} m is one pixel series "
            "(mean of its pixels); coordinates of the tile, masked where the shards have none"
        )

    def tokens(self, images: Images) -> dict[str, Tensor]:
        """{JOINT: (B, 1, L, E)}."""
        reader, grid = self._reader, self._grid
        groups, valid = {}, {}
        for name in reader.found:
            series = reader.read(images, name, grid)
            values = ndvi(series.values) if name == "NDVI" else series.values
            groups[name] = _per_cell(values)
            if series.valid is not None:
                valid[name] = series.valid.repeat_interleave(grid**2, dim=0)
        terrain = reader.terrain(images, grid, self._extent_m)
        if terrain is not None:
            groups["SRTM"] = _per_cell(_BY_NAME["SRTM"].normalised(terrain)[:, None])
        xyz, known = cartesian(images.latlon)
        valid["latlon"] = known[:, None].repeat_interleave(grid**2, dim=0)
        months = reader.months(images).repeat_interleave(grid**2, dim=0)
        xyz = xyz.repeat_interleave(grid**2, dim=0)
        parts = []
        for first in range(0, len(months), _MAX_SERIES):
            part = slice(first, first + _MAX_SERIES)
            parts.append(
                self.network(
                    {n: g[part] for n, g in groups.items()},
                    months[part],
                    xyz[part],
                    {n: v[part] for n, v in valid.items()},
                )
            )
        return {JOINT: torch.cat(parts).unflatten(0, (-1, 1, grid**2))}

    def reinitialise(self) -> None:
        """Random initial weights, as in the original code."""
        initialise_linear(self.network)
        nn.init.normal_(self.network.dw_embed.weight)
        nn.init.normal_(self.network.channel_embed.weight)


def _per_cell(values: Tensor) -> Tensor:
    """(B, T, C, G, G) -> (B·G², T, C)."""
    return values.flatten(3).permute(0, 3, 1, 2).flatten(0, 1)


def _positions(length: int, width: int) -> Tensor:
    """(length, width): sines in even columns, cosines in odd ones, of wavelengths up to 2π·1000."""
    rates = 1000.0 ** (-2 * torch.arange(width).div(2, rounding_mode="floor").double() / width)
    angles = torch.arange(length).double()[:, None] * rates
    angles[:, 0::2], angles[:, 1::2] = angles[:, 0::2].sin(), angles[:, 1::2].cos()
    return angles.float()

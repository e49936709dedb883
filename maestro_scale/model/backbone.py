"""A MAESTRO encoder as a backbone of other decoders: a module from tensors to feature maps on one grid.

Shapes: B batch, D dates, C bands, S sensors, E width, g cells per side of the common grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from operator import index
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.decoders import evenly_spread
from maestro_scale.model.heads import resize_tokens
from maestro_scale.model.layout import Layout
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.tensors import Pixels, named_inputs

Merge = Literal["concat", "mean"]
NUM_MAPS = 4


class Backbone(nn.Module):
    """Feature maps of several depths of an encoder: a list of (B, out_channels[i], g, g), channels first.

    Dates are averaged per sensor, sensors resized to one grid and concatenated (or averaged). ``out_indices``: numbers
    of the blocks, from 0, as they are in order; ``out_channels``: of each map; ``scales[i]``: its cells per side are
    ``scales[i]`` times ``grid``; ``sensors``: names; ``num_dates``: of each sensor. Every map is normalised as the last
    block is. The module is a function of its weights and inputs only, without random numbers, and alike in training
    and evaluation.
    """

    def __init__(
        self,
        model: Maestro,
        view: ModelConfig,
        out_indices: Sequence[int] | int | None = None,
        merge: Merge = "concat",
        grid: int | None = None,
        scales: Sequence[float] | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        depth = model.config.size.depth
        self.out_indices = _blocks(out_indices, depth)
        self.scales = tuple(scales) if scales is not None else (1.0,) * len(self.out_indices)
        if len(self.scales) != len(self.out_indices) or not all(0 < s < math.inf for s in self.scales):
            raise ValueError(
                f"scales {self.scales}: give {len(self.out_indices)} positive numbers, one per map"
            )
        if merge not in ("concat", "mean"):
            raise ValueError(f"merge {merge!r}: use concat or mean")
        if grid is not None and not _is_count(grid):
            raise ValueError(f"grid {grid!r}: give a whole number of cells per side, at least 1")
        self.merge, self.view, self.depth = merge, view, depth
        self.sensors = tuple(s.name for s in view.sensors)
        self.num_dates = {s.name: s.num_dates for s in view.sensors}
        ref = next((s for s in view.sensors if s.name == view.ref_sensor), None)
        self.grid = grid or (ref.grid if ref else max(s.grid for s in view.sensors))
        width = model.config.size.width * (len(self.sensors) if merge == "concat" else 1)
        self.out_channels = [width] * len(self.out_indices)
        self.encoder = model
        like = next(model.parameters())
        # Constants as buffers, so that they move with the module and are constants of an exported program.
        layout = Layout.of(view, {"enc": model.positions["enc"]}, None, like)
        self.register_buffer("positions", layout.positions["enc"], persistent=False)
        self.register_buffer("date_rows", layout.dates, persistent=False)
        self._layout = replace(layout, positions={}, dates=torch.empty(0))
        if frozen:
            self.freeze()

    positions: Tensor
    date_rows: Tensor

    def freeze(self) -> None:
        """Train none of its parameters."""
        self.requires_grad_(False)

    def forward(
        self,
        pixels: Pixels,
        dates: Mapping[str, Tensor] | None = None,
        ref_date: Tensor | None = None,
    ) -> list[Tensor]:
        """Raw values {sensor: (B, D, C, H, W)} and dates {sensor: (B, D, 3)} of every sensor -> maps, shallowest first.

        As ``stream.tensors.named_inputs``: (B, C, H, W) is one date, a tensor is the only sensor, and dates may be
        missing. Images of another size are resized (nearest) as those of training. ValueError where a sensor is missing
        or has another number of dates than ``num_dates``.
        """
        images, when, reference = named_inputs(self.view.sensors, pixels, dates, ref_date)
        for s in self.view.sensors:
            if s.name not in images:
                raise ValueError(f"sensor {s.name} is missing; for fewer sensors: backbone(…, sensors=[…])")
            found = tuple(images[s.name].shape[1:3])
            if found != (s.num_dates, len(s.bands)):
                raise ValueError(
                    f"sensor {s.name}: {found[0]} dates of {found[1]} bands, but the backbone has {s.num_dates} of "
                    f"{len(s.bands)}; for other dates: backbone(…, num_dates={{{s.name!r}: {found[0]}}})"
                )
        layout = replace(self._layout, positions={"enc": self.positions}, dates=self.date_rows)
        depths = sorted(set(self.out_indices))
        by_depth = self.encoder.tokens_at_depths(layout, images, when, reference, depths)
        maps = [self._map(by_depth[depths.index(i)]) for i in self.out_indices]
        return [self._scaled(x, factor) for x, factor in zip(maps, self.scales, strict=True)]

    def _map(self, tokens: dict[str, Tensor]) -> Tensor:
        """{sensor: (B, R, L, E)} -> (B, E or S·E, g, g)."""
        means = [resize_tokens(t.mean(dim=1, keepdim=True), self.grid).squeeze(2) for t in tokens.values()]
        merged = torch.cat(means, dim=-1) if self.merge == "concat" else torch.stack(means).mean(dim=0)
        return merged.transpose(1, 2).unflatten(-1, (self.grid, self.grid))

    def _scaled(self, x: Tensor, factor: float) -> Tensor:
        side = max(round(self.grid * factor), 1)
        if side == self.grid:
            return x
        if side < self.grid and self.grid % side == 0:
            return F.avg_pool2d(x, self.grid // side)
        return F.interpolate(x, size=(side, side), mode="bilinear")


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 1


def _blocks(given: Sequence[int] | int | None, depth: int) -> tuple[int, ...]:
    if given is None:
        return evenly_spread(depth, NUM_MAPS)
    many = [int(given)] if isinstance(given, int | Integral) else given
    try:
        numbers = [index(i) for i in many]  # of numpy and tensors too
    except TypeError:
        numbers = []
    found = tuple(i + depth if i < 0 else i for i in numbers)
    if not found or not all(0 <= i < depth for i in found) or list(found) != sorted(found):
        raise ValueError(
            f"out_indices {tuple(many)}: give ascending numbers of blocks from 0 to {depth - 1} (or negative ones)"
        )
    return found


def backbone_view(
    config: ModelConfig,
    sensors: Sequence[str] | None = None,
    dataset: str | None = None,
    num_dates: Mapping[str, int] | None = None,
    crop_m: float | None = None,
) -> ModelConfig:
    """The view of a model for these sensors, dates and this extent.

    ValueError for a sensor or dataset that the model does not have, or an extent that does not fit its patches.
    """
    names = [v.dataset for v in config.views]
    if dataset and dataset not in (*names, *(name.partition("#")[0] for name in names)):
        raise ValueError(f"the model has no dataset {dataset!r}; it has: {', '.join(names)}")
    view = config.for_dataset(dataset or config.dataset)
    known = {s.name: s for s in view.sensors}
    if num_dates is not None and not isinstance(num_dates, Mapping):
        raise ValueError(
            f"num_dates {num_dates!r}: give dates by sensor, for example {{{next(iter(known))!r}: 2}}"
        )
    sensors = (sensors,) if isinstance(sensors, str) else sensors
    if unknown := [n for n in (*(sensors or ()), *(num_dates or {})) if n not in known]:
        raise ValueError(f"the model has no sensor {unknown[0]!r}; it has: {', '.join(known)}")
    used = [known[n] for n in known if sensors is None or n in sensors]
    dates = {s.name: (num_dates or {}).get(s.name, s.num_dates) for s in used}
    if bad := [n for n, count in dates.items() if not _is_count(count)]:
        raise ValueError(f"num_dates: {bad[0]} has {dates[bad[0]]!r}; give a whole number, at least 1")
    shapes = {s.name: (1, dates[s.name], len(s.bands), s.image_size, s.image_size) for s in used}
    return view.adapted_to(shapes, crop_m)


def without_decoder(model: Maestro, view: ModelConfig) -> Maestro:
    """The encoder for ``view`` alone, with the weights of ``model`` that it needs."""
    made = Maestro(replace(view, others=(), heads=()), decodes=False)
    state = model.state_dict()
    made.load_state_dict({name: state[name] for name in made.state_dict()})
    assert not any(math.isnan(float(p.detach().flatten()[0])) for p in made.parameters()), (
        "every weight is loaded"
    )
    return made

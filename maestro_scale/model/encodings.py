"""Encodings of tokens: sine-cosine positions on a common ground grid, and dates relative to a reference date.

The first E-8 channels hold the position, the last 8 the date (arXiv 2508.10894, section on encodings).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.model.constants import ConstantCache

DATE_CHANNELS = 8
DAYS_PER_YEAR = 365.25


def position_table(grid: int, pos_grid: int, width: int) -> Tensor:
    """(grid*grid, width) float32, zeros in the last 8 channels.

    Sine-cosine of the column, then of the row, on a fine ``pos_grid`` x ``pos_grid`` ground grid, averaged over the
    footprint of each token, so that tokens of different sensors over the same ground have similar encodings.
    """
    # In double, rounded to float32 at the end.
    quarter = (width - DATE_CHANNELS) // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1))
    angles = torch.arange(pos_grid, dtype=torch.float64)[:, None] * omega
    x = torch.cat([angles.sin(), angles.cos()], dim=1)  # (pos_grid, 2 * quarter)
    fine = torch.cat(
        [x[None, :, :].expand(pos_grid, -1, -1), x[:, None, :].expand(-1, pos_grid, -1)], dim=2
    ).permute(2, 0, 1)[None]
    if pos_grid % grid:
        side = grid * max(round(pos_grid / grid), 1)
        fine = F.interpolate(fine, size=(side, side), mode="bilinear")
    pooled = F.avg_pool2d(fine, fine.shape[-1] // grid)[0]
    return F.pad(pooled.flatten(1).T, (0, DATE_CHANNELS)).float()


def date_encoding(dates: Tensor, ref_date: Tensor) -> Tensor:
    """(B, D, 3) and (B, 3) of year, day of year, hour -> (B, D, 8) float32: years since the reference in the first
    four channels, then sine and cosine of the day of the year and of the hour."""
    dates, ref = dates.float(), ref_date.float()[:, None]
    since = dates - ref
    years = torch.add(since[..., 0], since[..., 1], alpha=1 / DAYS_PER_YEAR)
    day = dates[..., 1] * (2 * math.pi / DAYS_PER_YEAR)
    hour = dates[..., 2] * (2 * math.pi / 24)
    return torch.stack([years] * 4 + [day.sin(), day.cos(), hour.sin(), hour.cos()], dim=-1)


class PositionTables:
    """Cache of position tables of one width, by grid and device.

    Not module buffers: DeepSpeed would cast those to bf16 together with the weights and round the positions.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._tables: ConstantCache[Tensor] = ConstantCache()

    def get(self, grid: int, pos_grid: int, like: Tensor) -> Tensor:
        """(grid*grid, width) float32 on the device of ``like``."""
        build = lambda: position_table(grid, pos_grid, self._width).to(like.device)  # noqa: E731
        return self._tables.get((grid, pos_grid), like, build)

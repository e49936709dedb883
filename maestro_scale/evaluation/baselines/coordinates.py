"""Latitude and longitude of tiles, for encoders that are given coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.stream.batch import Batch


def latlon(batch: Batch, spec: DatasetSpec, device: torch.device) -> Tensor:
    """(B, 2) latitude and longitude of the centres of a batch's tiles in degrees; NaN where it is not known."""
    return torch.full((len(batch), 2), torch.nan, device=device)

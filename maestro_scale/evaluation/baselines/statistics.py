"""Channel statistics: a baseline without weights."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.evaluation.baselines.baseline import Baseline
from maestro_scale.model.embed import network_input, patchify


class ChannelStatistics(Baseline):
    """Per patch the mean and standard deviation of every band: E = 2·C. Has no weights."""

    def __init__(self, spec: DatasetSpec) -> None:
        super().__init__("statistics", spec)

    def tokens(self, sensor: Sensor, pixels: Tensor) -> Tensor:
        """(B, D, L, 2·C)."""
        patches = patchify(network_input(sensor, pixels), sensor.patch)
        return torch.cat([patches.mean(dim=3), patches.std(dim=3, correction=0)], dim=-1)

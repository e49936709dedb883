"""Reconstruction targets and loss, as sums and counts, so that the parts of a batch add up to the whole.

Shapes: B batch, D dates, L tokens per date, P patch side, C bands, G token groups, R = G*D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig

VARIANCE_FLOOR = 1e-6
ERRORS: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}  # by ``model.loss``


def target_groups(config: ModelConfig, sensor: Sensor) -> tuple[int, ...]:
    """Bands per normalisation group: the sensor's band groups, all bands, or () for no normalisation."""
    return {"patch_group": sensor.band_groups, "patch": (len(sensor.bands),), "none": ()}[config.target]


def normalise(config: ModelConfig, sensor: Sensor, patches: Tensor) -> Tensor:
    """(B, D, L, P*P, C) -> the same: (x - mean) / sqrt(unbiased variance + 1e-6) over each patch and group."""
    groups = target_groups(config, sensor)
    if not groups:
        return patches
    parts = []
    for part in patches.split(list(groups), dim=-1):
        variance, mean = torch.var_mean(part, dim=(-2, -1), keepdim=True)
        parts.append((part - mean) * (variance + VARIANCE_FLOOR).rsqrt())
    return torch.cat(parts, dim=-1)


def denormalise(config: ModelConfig, sensor: Sensor, prediction: Tensor, patches: Tensor) -> Tensor:
    """Predictions in the units of the pixels (for pictures): the inverse of ``normalise``, with the statistics of the
    true ``patches``; (B, D, L, P*P, C)."""
    groups = target_groups(config, sensor)
    if not groups:
        return prediction
    parts = []
    for predicted, part in zip(
        prediction.split(list(groups), -1), patches.split(list(groups), -1), strict=True
    ):
        variance, mean = torch.var_mean(part, dim=(-2, -1), keepdim=True)
        parts.append(predicted * (variance + VARIANCE_FLOOR).sqrt() + mean)
    return torch.cat(parts, dim=-1)


def masked_bands(config: ModelConfig, sensor: Sensor, masked: Tensor) -> Tensor:
    """Token mask (B, R, L) -> (B, D, L, 1, C) bool: which bands of which patch are masked."""
    groups = config.token_groups(sensor)
    per_group = masked.unflatten(1, (len(groups), sensor.num_dates))  # group-major
    repeats = torch.tensor(groups, device=masked.device)
    return per_group.repeat_interleave(repeats, dim=1, output_size=sum(groups)).permute(0, 2, 3, 1)[
        :, :, :, None
    ]


def error_sum(
    config: ModelConfig, sensor: Sensor, prediction: Tensor, patches: Tensor, masked: Tensor
) -> Tensor:
    """Sum of |error| (l1) or error**2 (l2) over the masked values; scalar, in fp32 or, for doubles, in double.

    bf16 predictions are widened first: a sum in bf16 would lose all but two digits.
    """
    precise = torch.promote_types(prediction.dtype, torch.float32)
    difference = prediction.to(precise) - normalise(config, sensor, patches)
    return (ERRORS[config.loss](difference) * masked_bands(config, sensor, masked)).sum()


def num_masked_values(config: ModelConfig, sensor: Sensor, masked: Tensor) -> Tensor:
    """Number of masked pixel values of a token mask (B, R, L); scalar.

    float64, because NCCL sums counts of all ranks and fp32 is exact below 2**24 only, fewer than a global batch has;
    float64 is exact below 2**53.
    """
    bands = masked_bands(config, sensor, masked)
    return bands.sum(dtype=torch.float64) * sensor.patch**2


def combine_losses(config: ModelConfig, sums: Tensor, counts: Tensor) -> Tensor:
    """The loss from error sums (S,) and global counts (S,) per sensor: means weighted by D*L, in fp32.

    A sensor without masked pixels in the whole global batch has no mean; its weight is left out.
    """
    # Weights count tokens of the pixel grid, without token groups, so that the loss does not depend on ``spectral``.
    weights = torch.tensor(
        [s.num_dates * s.grid**2 for s in config.sensors], dtype=torch.float64, device=counts.device
    )
    weights = weights * (counts > 0)
    # In double until here: counts exceed 2**24. clamp_min avoids 0 / 0 where the weight is 0.
    share = weights / weights.sum() / counts.clamp_min(1)
    return (sums * share.to(sums.dtype)).sum()

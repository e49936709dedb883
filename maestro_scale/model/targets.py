"""Reconstruction targets and loss, as sums and counts, so that the parts of a batch add up to the whole.

Shapes: B batch, D dates, L tokens per date, P patch side, C bands, G token groups, R = G*D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.constants import ConstantCache
from maestro_scale.model.sequences import num_rows, sequences

VARIANCE_FLOOR = 1e-6
_NO_WEIGHT = 1e-300
ERRORS: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}  # by ``model.loss``


def target_groups(config: ModelConfig, sensor: Sensor) -> tuple[int, ...]:
    """Bands per normalisation group: the sensor's band groups, all bands, or () for no normalisation."""
    return {"patch_group": sensor.band_groups, "patch": (len(sensor.bands),), "none": ()}[config.target]


def normalise(config: ModelConfig, sensor: Sensor, patches: Tensor) -> Tensor:
    """(..., P*P, C) -> the same: (x - mean) / sqrt(unbiased variance + 1e-6) over each patch and group."""
    groups = target_groups(config, sensor)
    if not groups:
        return patches
    parts, start = [], 0
    for size, run in itertools.groupby(groups):
        count = len(list(run))  # groups of equal size are normalised together
        part = patches[..., start : start + count * size].unflatten(-1, (count, size))
        variance, mean = torch.var_mean(part, dim=(-3, -1), keepdim=True)
        parts.append(((part - mean) * (variance + VARIANCE_FLOOR).rsqrt()).flatten(-2))
        start += count * size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


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
    per_group = masked.unflatten(1, (len(groups), sensor.num_dates)).unbind(1)  # group-major
    bands = [m[..., None, None].expand(-1, -1, -1, 1, n) for m, n in zip(per_group, groups, strict=True)]
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=-1)


def error_sum(
    config: ModelConfig, sensor: Sensor, prediction: Tensor, patches: Tensor, masked: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of |error| (l1) or error**2 (l2) over the masked values, and that of predicting zero; scalars, in fp32 or,
    for doubles, in double.

    bf16 predictions are widened first: a sum in bf16 would lose all but two digits.
    """
    precise = torch.promote_types(prediction.dtype, torch.float32)
    target, bands = normalise(config, sensor, patches), masked_bands(config, sensor, masked)
    # First, so that its temporary tensors are freed before autograd keeps those of the errors.
    zero = (ERRORS[config.loss](target) * bands).sum()
    return (ERRORS[config.loss](prediction.to(precise) - target) * bands).sum(), zero


def masked_token_errors(
    config: ModelConfig,
    sensor: Sensor,
    predictions: Sequence[Tensor],
    patches: Tensor,
    of_sensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Error sums (T,) of the masked tokens of a sequence of T sensors with equal patches, and those of predicting zero,
    in fp32 or double.

    ``predictions``: by sensor, (rows, M, P*P*C), of all masked tokens. ``patches``: their patches (rows, M, P*P, C).
    ``of_sensor`` (rows, M, T): 1 where a token is one of the sensor and counts, else 0; None if T is 1 and all count.
    ``sensor``: any of them.
    """
    # A bf16 prediction minus an fp32 target is computed in fp32.
    target = normalise(config, sensor, patches)
    # First, so that its temporary tensor is freed before autograd keeps those of the errors.
    zero = ERRORS[config.loss](target).sum(dim=None if of_sensor is None else (-2, -1))
    errors = ERRORS[config.loss](
        torch.stack([p.unflatten(-1, target.shape[-2:]) for p in predictions], dim=2) - target[:, :, None]
    )
    if of_sensor is None:
        return errors.sum()[None], zero[None]
    by_sensor = errors.sum(dim=(-2, -1)) * of_sensor, zero[:, :, None] * of_sensor
    return by_sensor[0].sum(dim=(0, 1)), by_sensor[1].sum(dim=(0, 1))


def num_masked_values(config: ModelConfig, sensor: Sensor, masked: Tensor) -> Tensor:
    """Number of masked pixel values of a token mask (B, R, L); scalar.

    float64, because NCCL sums counts of all ranks and fp32 is exact below 2**24 only, fewer than a global batch has;
    float64 is exact below 2**53.
    """
    bands = masked_bands(config, sensor, masked)
    return bands.sum(dtype=torch.float64) * sensor.patch**2


def masked_counts(config: ModelConfig, masked: Sequence[Tensor]) -> Tensor:
    """(S,) float64: ``num_masked_values`` of every sensor, from the token masks (rows, N) of all sequences in order."""
    tokens = torch.cat(
        [
            m.reshape(len(m) // num_rows(config, q), -1)
            for q, m in zip(sequences(config), masked, strict=True)
        ],
        dim=1,
    )
    values = _CONSTANTS.get(("values", config), tokens, lambda: _values_per_token(config).to(tokens.device))
    return tokens.sum(0, dtype=torch.float64) @ values


def _values_per_token(config: ModelConfig) -> Tensor:
    """(tokens of all sequences, S) float64: pixel values of each token, in the column of its sensor."""
    names = [s.name for s in config.sensors]
    parts = []
    for q in sequences(config):
        for s in q.sensors:
            for bands in config.token_groups(s):
                values = torch.zeros(s.num_dates * s.grid**2, len(names), dtype=torch.float64)
                values[:, names.index(s.name)] = bands * s.patch**2
                parts.append(values)
    return torch.cat(parts)


def loss_weights(config: ModelConfig, like: Tensor) -> Tensor:
    """(S,) float64: weight of each sensor in the loss, D*L, on the device of ``like``.

    Tokens of the pixel grid, without token groups, so that the loss does not depend on ``spectral``."""
    weights = [s.num_dates * s.grid**2 for s in config.sensors]
    return _CONSTANTS.get(
        ("weights", tuple(weights)), like, lambda: torch.tensor(weights, dtype=torch.float64).to(like.device)
    )


def combine_losses(config: ModelConfig, sums: Tensor, counts: Tensor) -> Tensor:
    """The loss from error sums (S,) and global counts (S,) per sensor: means weighted by D*L, in fp32."""
    return weighted_loss(loss_weights(config, counts), sums, counts)


def weighted_loss(weights: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """``combine_losses`` from the ``loss_weights`` (S,).

    A sensor without masked pixels in the whole global batch has no mean; its weight is left out. Without any, where all
    of them have nodata, the loss is 0.
    """
    # Not 0, so that the sum is not 0 either; any other weight absorbs it.
    weights = weights.masked_fill(counts == 0, _NO_WEIGHT)
    # In double until here: counts exceed 2**24. clamp_min avoids 0 / 0 where the weight is 0.
    share = weights / weights.sum() / counts.clamp_min(1)
    return (sums * share.to(sums.dtype)).sum()


_CONSTANTS: ConstantCache[Tensor] = ConstantCache()

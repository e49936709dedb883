"""Token masks of MAESTRO: structural masks first, then exactly ``ratio`` of the tokens of every sequence.

Masks are drawn here, but no random number is: they are a function of ``Batch.noise``, which the loader drew from
(seed, epoch, sample). So a mask does not depend on rank, micro-batch size or device, and can be replayed from the
sample's key (invariant 1 of docs/architecture.md). Everything runs on the batch's device without host synchronisation.

Shapes: B batch, R token grids, L tokens per grid, N tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sequences import Sequence, num_tokens, pack, sequences, unpack
from maestro_scale.stream.batch import NUM_REDRAWS, Batch


@dataclass(frozen=True)
class MaskingConfig:
    """Share of tokens to mask and probabilities of the structural masks, which are independent per sample."""

    ratio: float = 0.75
    modality: float = 0.25
    date: float = 0.25
    location: float = 0.25
    band_group: float = 0.0


@dataclass(frozen=True)
class Mask:
    """The mask of one sequence. ``masked``: (rows, N) bool. ``visible_index`` (rows, K) and ``masked_index``
    (rows, N - K): int64 token indices, each in ascending order."""

    masked: Tensor
    visible_index: Tensor
    masked_index: Tensor

    @staticmethod
    def of(masked: Tensor) -> Mask:
        """The mask of a (rows, N) bool tensor; ValueError unless every row masks the same number of tokens."""
        counts = masked.sum(1)
        if bool((counts != counts[0]).any()):
            raise ValueError(f"every row must mask the same number of tokens; got {counts.unique().tolist()}")
        order = masked.to(torch.uint8).argsort(dim=1, stable=True)
        num_visible = masked.shape[1] - int(counts[0])
        return Mask(masked, order[:, :num_visible], order[:, num_visible:])


def num_masked(ratio: float, tokens: int) -> int:
    """Masked tokens of a sequence: round(ratio * N), but at least one token stays visible."""
    return min(round(ratio * tokens), tokens - 1)


def draw_masks(config: ModelConfig, masking: MaskingConfig, batch: Batch) -> dict[str, Mask]:
    """{sequence name: Mask} for a batch, from ``batch.noise`` alone."""
    return {s.name: _draw_mask(config, masking, s, batch) for s in sequences(config)}


def masks_by_sensor(config: ModelConfig, masks: dict[str, Mask]) -> dict[str, Tensor]:
    """{sensor: (B, R, L)} bool: the masked tokens by sensor instead of by sequence."""
    return {k: v for q in sequences(config) for k, v in unpack(config, q, masks[q.name].masked).items()}


def _draw_mask(config: ModelConfig, masking: MaskingConfig, sequence: Sequence, batch: Batch) -> Mask:
    noise, structure = {}, {}
    for sensor in sequence.sensors:
        groups = len(config.token_groups(sensor))
        noise[sensor.name], structure[sensor.name] = _split_noise(
            masking, sensor, groups, batch.noise[sensor.name], shares_group=len(sequence.sensors) > 1
        )
    candidates = pack(sequence, structure)  # (rows, N, redraws)
    # The reference redraws a structural mask that masks a whole sequence. A loop on a tensor's value would
    # synchronise with the host, so the noise holds NUM_REDRAWS candidates: take the first that leaves a token visible,
    # or, if all fail (probability below 1e-9 with the default probabilities), no structure at all.
    possible = ~candidates.all(dim=1)
    first = possible.to(torch.uint8).argmax(dim=1)
    structural = candidates.gather(2, first[:, None, None].expand(-1, candidates.shape[1], 1))[..., 0]
    structural &= possible.any(dim=1, keepdim=True)
    # Structurally masked tokens are masked first; noise in [0, 1) orders the tokens within both classes at random. The
    # number of masked tokens is fixed, not binomial: sequences of one batch must have the same length.
    order = (structural + pack(sequence, noise)).argsort(dim=1, descending=True, stable=True)
    quota = num_masked(masking.ratio, num_tokens(config, sequence))
    masked = torch.zeros_like(structural).scatter_(1, order[:, :quota], True)
    # Ascending order, so that the encoder's input keeps the order of tokens and is the same on every device.
    masked_index, visible_index = (part.sort(dim=1).values for part in (order[:, :quota], order[:, quota:]))
    return Mask(masked, visible_index, masked_index)


def _split_noise(
    masking: MaskingConfig, sensor: Sensor, groups: int, noise: Tensor, shares_group: bool
) -> tuple[Tensor, Tensor]:
    """Token noise (B, R, L) and structural candidates (B, R, L, redraws) of a sensor; layout as in ``num_noise``."""
    batch, dates, cells, all_groups = (
        noise.shape[0],
        sensor.num_dates,
        sensor.grid**2,
        sensor.max_token_groups,
    )
    tokens, rest = noise.split(
        [dates * cells * all_groups, noise.shape[1] - dates * cells * all_groups], dim=1
    )
    ranks = tokens[:, : groups * dates * cells].reshape(batch, groups * dates, cells)
    modality, date, location, band = (
        rest.reshape(batch, NUM_REDRAWS, -1).transpose(1, 2).split([1, dates, cells, all_groups], dim=1)
    )
    # A factor False switches off a mask that would always hide a sensor's only date, token group, or the only sensor.
    masked = (band < masking.band_group * (groups > 1))[:, :groups, None, None]
    masked = masked | (date < masking.date * (dates > 1))[:, None, :, None]
    masked = masked | (location < masking.location)[:, None, None]
    masked = masked | (modality < masking.modality * shares_group)[:, :, None, None]
    return ranks, masked.flatten(1, 2)

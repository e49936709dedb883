"""What the model does not see: structural masks, then exactly the asked share of every sequence.

Everything is computed on the batch's device from the batch's own noise, without host synchronisation, so a mask is
a pure function of the sample's key. Shapes: B batch, R token grids, L tokens per grid, N tokens of a sequence.
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
class Masking:
    """Probabilities of the structural masks (drawn independently per sample) and the share of tokens hidden."""

    ratio: float = 0.75
    modality: float = 0.25
    date: float = 0.25
    location: float = 0.25
    band_group: float = 0.0


@dataclass(frozen=True)
class Mask:
    """One sequence's mask. ``hidden``: (rows, N) bool. ``visible`` (rows, K) and ``masked`` (rows, N - K): int64, the
    indices of both kinds in ascending order."""

    hidden: Tensor
    visible: Tensor
    masked: Tensor

    @staticmethod
    def of(hidden: Tensor) -> Mask:
        """From a boolean mask with the same number of hidden tokens in every row (else ValueError)."""
        counts = hidden.sum(1)
        if bool((counts != counts[0]).any()):
            raise ValueError(f"every row must hide the same number of tokens; got {counts.unique().tolist()}")
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        num_visible = hidden.shape[1] - int(counts[0])
        return Mask(hidden, order[:, :num_visible], order[:, num_visible:])


def num_hidden(ratio: float, tokens: int) -> int:
    """How many of a sequence's tokens are hidden: round(ratio * N), leaving at least one visible."""
    return min(round(ratio * tokens), tokens - 1)


def draw_masks(config: ModelConfig, masking: Masking, batch: Batch) -> dict[str, Mask]:
    """{sequence name: Mask} for a batch, from ``batch.noise`` alone."""
    return {s.name: _draw(config, masking, s, batch) for s in sequences(config)}


def by_sensor(config: ModelConfig, masks: dict[str, Mask]) -> dict[str, Tensor]:
    """{sensor: (B, R, L)} bool: what is hidden, sorted by sensor instead of by sequence."""
    return {k: v for q in sequences(config) for k, v in unpack(config, q, masks[q.name].hidden).items()}


def _draw(config: ModelConfig, masking: Masking, sequence: Sequence, batch: Batch) -> Mask:
    noise, structure = {}, {}
    for sensor in sequence.sensors:
        groups = len(config.token_groups(sensor))
        noise[sensor.name], structure[sensor.name] = _sensor_draws(
            masking, sensor, groups, batch.noise[sensor.name], shares_group=len(sequence.sensors) > 1
        )
    candidates = pack(sequence, structure)  # (rows, N, redraws)
    # A sequence whose every token is masked is redrawn: take the first candidate that leaves a token, or, were all
    # to fail (probability below 1e-9 with the default masks), no structure at all.
    possible = ~candidates.all(dim=1)
    first = possible.to(torch.uint8).argmax(dim=1)
    structural = candidates.gather(2, first[:, None, None].expand(-1, candidates.shape[1], 1))[..., 0]
    structural &= possible.any(dim=1, keepdim=True)
    # Structurally masked tokens are hidden first; noise in [0, 1) breaks ties within both classes.
    order = (structural + pack(sequence, noise)).argsort(dim=1, descending=True, stable=True)
    quota = num_hidden(masking.ratio, num_tokens(config, sequence))
    hidden = torch.zeros_like(structural).scatter_(1, order[:, :quota], True)
    masked, visible = (part.sort(dim=1).values for part in (order[:, :quota], order[:, quota:]))
    return Mask(hidden, visible, masked)


def _sensor_draws(
    masking: Masking, sensor: Sensor, groups: int, noise: Tensor, shares_group: bool
) -> tuple[Tensor, Tensor]:
    """Noise (B, R, L) and structural candidates (B, R, L, redraws) of one sensor; layout as ``num_noise`` says."""
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
    hit = (band < masking.band_group * (groups > 1))[:, :groups, None, None]
    hit = hit | (date < masking.date * (dates > 1))[:, None, :, None]
    hit = hit | (location < masking.location)[:, None, None]
    hit = hit | (modality < masking.modality * shares_group)[:, :, None, None]
    return ranks, hit.flatten(1, 2)

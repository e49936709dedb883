"""Token masks of MAESTRO: structural masks first, then exactly ``ratio`` of the tokens of every sequence.

Masks are drawn here, but no random number is: they are a function of ``Batch.noise``, which the loader drew from
(seed, epoch, sample). So a mask does not depend on rank, micro-batch size or device, and can be replayed from the
sample's key (invariant 1 of docs/architecture.md). Everything runs on the batch's device without host synchronisation.

Shapes: B batch, R token grids, L tokens per grid, Q rows of all sequences, N tokens of a sequence, at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.constants import ConstantCache
from maestro_scale.model.sequences import by_sensor, num_rows, num_tokens, pack, sequences
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
    (rows, N - K): int64 token indices, each in ascending order. ``complete``: (rows, N) bool, tokens that count in the
    loss where they are masked, since their patches have no invalid pixel; None: all of them."""

    masked: Tensor
    visible_index: Tensor
    masked_index: Tensor
    complete: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """(rows, N) bool: the tokens whose errors are the loss."""
        return self.masked if self.complete is None else self.masked & self.complete

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
    """{sequence name: Mask} for a batch, from ``batch.noise``; what counts in the loss, from ``batch.nodata``."""
    # All sequences at once, padded to the longest: each operation below is one for the batch.
    noise = torch.cat([batch.noise[s.name] for s in config.sensors], dim=1)
    plan = _PLANS.get((config, masking), noise, lambda: _Plan.of(config, masking, noise.device))
    structural = _structural(plan, noise)  # (B, Q, N)
    # Structurally masked tokens are masked first; noise in [0, 1) orders the tokens within both classes at random. The
    # number of masked tokens is fixed, not binomial: sequences of one batch must have the same length.
    ranks = noise.index_select(1, plan.noise_index).view_as(structural)
    order = (structural + ranks).masked_fill(plan.padding, -1.0).argsort(dim=2, descending=True, stable=True)
    # 1 for the first tokens in this order, the masked ones; 0 for the others, 2 for padding.
    classes = torch.empty_like(order, dtype=torch.uint8).scatter_(2, order, plan.classes.expand_as(order))
    masked = classes == 1
    # Ascending order, so that the encoder's input keeps the order of tokens and is the same on every device.
    index = classes.argsort(dim=2, stable=True)
    masks, row = {}, 0
    complete = _complete_tokens(config, batch) if batch.nodata else {}
    for sequence in sequences(config):
        rows, tokens = num_rows(config, sequence), num_tokens(config, sequence)
        visible = tokens - num_masked(masking.ratio, tokens)

        def part(x: Tensor, start: int, stop: int, row: int = row, rows: int = rows) -> Tensor:
            return x[:, row : row + rows, start:stop].flatten(0, 1)

        masks[sequence.name] = Mask(
            part(masked, 0, tokens),
            part(index, 0, visible),
            part(index, visible, tokens),
            complete.get(sequence.name),
        )
        row += rows
    return masks


def masks_by_sensor(config: ModelConfig, masks: dict[str, Mask]) -> dict[str, Tensor]:
    """{sensor: (B, R, L)} bool: the masked tokens by sensor instead of by sequence."""
    return by_sensor(config, {name: mask.masked for name, mask in masks.items()})


def counted_by_sensor(config: ModelConfig, masks: dict[str, Mask]) -> dict[str, Tensor]:
    """As :func:`masks_by_sensor`, of the masked tokens that count in the loss."""
    return by_sensor(config, {name: mask.counted for name, mask in masks.items()})


def _complete_tokens(config: ModelConfig, batch: Batch) -> dict[str, Tensor]:
    """{sequence name: (rows, N)} bool: the tokens of patches without an invalid pixel."""
    # One value for each token, so that the same ``pack`` orders them as it orders the tokens.
    complete = {}
    for s in config.sensors:
        groups = len(config.token_groups(s))
        if s.name in batch.nodata:
            complete[s.name] = ~batch.nodata[s.name].repeat(1, groups, 1)
        else:
            shape = (len(batch), groups * s.num_dates, s.grid**2)
            complete[s.name] = torch.ones(shape, dtype=torch.bool, device=batch.ref_date.device)
    # A sequence without such a sensor is computed as if there were none.
    affected = (q for q in sequences(config) if any(s.name in batch.nodata for s in q.sensors))
    return {q.name: pack(q, complete) for q in affected}


def _structural(plan: _Plan, noise: Tensor) -> Tensor:
    """(B, Q, N) bool: the structural masks of all rows."""
    flags = (noise < plan.thresholds).index_select(1, plan.flag_index)
    candidates = flags.view(len(noise), *plan.padding.shape, NUM_REDRAWS, 4).any(dim=-1)
    # The reference redraws a structural mask that masks a whole sequence. A loop on a tensor's value would
    # synchronise with the host, so the noise holds NUM_REDRAWS candidates: take the first that leaves a token visible,
    # or, if all fail (probability below 1e-9 with the default probabilities), no structure at all.
    complete = candidates.all(dim=2)  # (B, Q, redraws); padding is always masked
    first = complete.to(torch.uint8).argmin(dim=2)
    chosen = candidates.gather(3, first[:, :, None, None].expand(*candidates.shape[:3], 1))[..., 0]
    return chosen > complete.all(dim=2, keepdim=True)  # chosen and not complete


@dataclass(frozen=True)
class _Plan:
    """Constants of ``draw_masks``, for Q rows (of all sequences) of N tokens, over the noise of all sensors (n).

    ``thresholds`` (n,): a structural mask is set where its number is less. ``flag_index`` (Q*N*redraws*4): of each
    token and candidate, the numbers of its modality, date, location and band group. ``noise_index`` (Q*N).
    ``padding`` (Q, N) bool. ``classes`` (Q, N) uint8: 1 for each masked token, then 0 for each visible one, 2 for
    padding.
    """

    thresholds: Tensor
    flag_index: Tensor
    noise_index: Tensor
    padding: Tensor
    classes: Tensor

    @staticmethod
    def of(config: ModelConfig, masking: MaskingConfig, device: torch.device) -> _Plan:
        shares_group = {s.name: len(q.sensors) > 1 for q in sequences(config) for s in q.sensors}
        thresholds, ranks, flags, start = [], {}, {}, 0
        for s in config.sensors:
            layout = _NoiseLayout(s, len(config.token_groups(s)), start)
            thresholds += layout.thresholds(masking, shares_group[s.name])
            ranks[s.name], flags[s.name] = layout.ranks(), layout.flags()
            start = len(thresholds)
        rows = []
        for q in sequences(config):
            rank, flag, quota = (
                pack(q, ranks),
                pack(q, flags),
                num_masked(masking.ratio, num_tokens(config, q)),
            )
            classes = torch.zeros(rank.shape, dtype=torch.uint8)
            classes[:, :quota] = 1
            rows += list(zip(rank, flag, classes, strict=True))
        longest = max(len(rank) for rank, _, _ in rows)

        def padded(i: int, value: int) -> Tensor:
            parts = [
                F.pad(row[i], (0, 0) * (row[i].dim() - 1) + (0, longest - len(row[i])), value=value)
                for row in rows
            ]
            return torch.stack(parts).to(device)

        # Padding points at the noise of the first token, whose threshold is above 1: it is always masked.
        classes = padded(2, 2)
        return _Plan(
            torch.tensor(thresholds).to(device),
            padded(1, 0).flatten(),
            padded(0, 0).flatten(),
            classes == 2,
            classes,
        )


@dataclass(frozen=True)
class _NoiseLayout:
    """Positions of a sensor's numbers in the noise of all sensors; the layout of ``num_noise``, from ``start``."""

    sensor: Sensor
    groups: int
    start: int

    def thresholds(self, masking: MaskingConfig, shares_group: bool) -> list[float]:
        """By number: 2.0 for those of tokens, the probability of the mask for the others."""
        s = self.sensor
        # A factor False switches off a mask that would always hide a sensor's only date, token group, or the only
        # sensor.
        candidate = [masking.modality * shares_group]
        candidate += [masking.date * (s.num_dates > 1)] * s.num_dates
        candidate += [masking.location] * s.grid**2
        candidate += [masking.band_group * (self.groups > 1)] * s.max_token_groups
        return [2.0] * self._num_tokens + candidate * NUM_REDRAWS

    def ranks(self) -> Tensor:
        """(1, R, L) int64: the number of each token."""
        s = self.sensor
        return self.start + torch.arange(self.groups * s.num_dates * s.grid**2).view(1, -1, s.grid**2)

    def flags(self) -> Tensor:
        """(1, R, L, redraws, 4) int64: the numbers of modality, date, location and band group."""
        s, cells = self.sensor, self.sensor.grid**2
        shape = (self.groups, s.num_dates, cells, NUM_REDRAWS)
        group, date, cell, redraw = (
            torch.arange(n).view([-1 if i == j else 1 for j in range(4)]).expand(shape)
            for i, n in enumerate(shape)
        )
        per_candidate = 1 + s.num_dates + cells + s.max_token_groups
        of_candidate = self.start + self._num_tokens + redraw * per_candidate
        date, cell, group = 1 + date, 1 + s.num_dates + cell, 1 + s.num_dates + cells + group
        offsets = [torch.zeros_like(redraw), date, cell, group]
        return torch.stack([of_candidate + o for o in offsets], dim=-1).flatten(0, 1)[None]

    @property
    def _num_tokens(self) -> int:
        return self.sensor.num_dates * self.sensor.grid**2 * self.sensor.max_token_groups


_PLANS: ConstantCache[_Plan] = ConstantCache()

"""Constant tensors of a forward pass: where each token of a dataset's sequences lies, in space, time and kind.

Shapes: N tokens of all sequences per sample, K of them visible, E width of a role ("enc", "dec").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.encodings import DATE_CHANNELS, PositionTables, date_encoding
from maestro_scale.model.masking import Mask
from maestro_scale.model.sequences import Sequence, num_rows, num_tokens, pack, sequences
from maestro_scale.model.targets import loss_weights


@dataclass(frozen=True)
class Layout:
    """What a forward pass needs to know of a dataset, for given numbers of visible tokens, on one device.

    ``positions[role]`` (N, E - 8) float32. ``dates`` (N,): the row of each token in the dates of all sensors. ``kinds``
    (N,): the mask vector of each token, among those of its sequence. ``of_sensor[sequence]`` (tokens, sensors) float32,
    1 where a token is one of the sensor: of sequences of several sensors. ``offsets`` (N,): what makes a token index of
    a row an index into all tokens, in the order of ``order``. ``loss_weights`` (S,).
    """

    view: ModelConfig
    sequences: tuple[Sequence, ...]
    positions: Mapping[str, Tensor]
    dates: Tensor
    kinds: Tensor
    of_sensor: Mapping[str, Tensor]
    offsets: Tensor
    loss_weights: Tensor

    @staticmethod
    def of(
        view: ModelConfig,
        tables: Mapping[str, PositionTables],
        masks: Mapping[str, Mask] | None,
        like: Tensor,
    ) -> Layout:
        """The layout for a view and masks of these shapes (None: no token is masked), on the device of ``like``."""
        device, seqs = like.device, sequences(view)
        positions = {
            role: torch.cat(
                [
                    table.get(s.grid, view.pos_grid, like)[:, :-DATE_CHANNELS].repeat(view.rows(s), 1)
                    for q in seqs
                    for s in q.sensors
                ]
            )
            for role, table in tables.items()
        }
        dates, start = {}, 0
        for s in view.sensors:
            rows = torch.arange(start, start + s.num_dates).repeat(len(view.token_groups(s)))
            dates[s.name] = rows[None, :, None].expand(1, -1, s.grid**2)
            start += s.num_dates
        kinds: list[int] = []
        of_sensor = {}
        for q in seqs:
            tokens = [
                (i, s.num_dates * s.grid**2) for i, s in enumerate(q.sensors) for _ in view.token_groups(s)
            ]
            kinds += [kind for kind, (_, n) in enumerate(tokens) for _ in range(n)]
            if len(q.sensors) > 1:
                sensor = torch.tensor([i for i, n in tokens for _ in range(n)])
                of_sensor[q.name] = F.one_hot(sensor, len(q.sensors)).float().to(device)
        return Layout(
            view,
            seqs,
            positions,
            torch.cat([pack(q, dates).flatten() for q in seqs]).to(device),
            torch.tensor(kinds).to(device),
            of_sensor,
            _offsets(view, masks).to(device),
            loss_weights(view, like),
        )

    def order(self, masks: Mapping[str, Mask]) -> Tensor:
        """(B, N) indices of tokens among those of all sequences: the visible ones of each sequence, then the masked."""
        parts = [masks[q.name].visible_index for q in self.sequences]
        parts += [masks[q.name].masked_index for q in self.sequences]
        rows = [num_rows(self.view, q) for q in self.sequences] * 2
        flat = [p.reshape(len(p) // r, r * p.shape[1]) for p, r in zip(parts, rows, strict=True)]
        return torch.cat(flat, dim=1) + self.offsets

    def date_rows(self, dates: Mapping[str, Tensor], ref_date: Tensor, order: Tensor | None) -> Tensor:
        """(B, N, 8): the date encodings of tokens in ``order`` (None: all, sequence by sequence)."""
        encoded = date_encoding(torch.cat([dates[s.name] for s in self.view.sensors], dim=1), ref_date)
        if order is None:
            return encoded.index_select(1, self.dates)
        return encoded.gather(1, self.dates[order][:, :, None].expand(-1, -1, DATE_CHANNELS))

    def encoding(self, role: str, dates: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, tokens, E): positions and dates of the tokens in ``order``, combined in fp32; ``dates``: their rows."""
        table = self.positions[role]
        positions = table.expand(dates.shape[0], -1, -1) if order is None else table[order]
        return torch.cat([positions, dates], dim=-1).to(dtype)


def _offsets(view: ModelConfig, masks: Mapping[str, Mask] | None) -> Tensor:
    visible, masked, start = [], [], 0
    for q in sequences(view):
        tokens, rows = num_tokens(view, q), num_rows(view, q)
        num_visible = tokens if masks is None else masks[q.name].visible_index.shape[1]
        first = start + tokens * torch.arange(rows)
        visible.append(first.repeat_interleave(num_visible))
        masked.append(first.repeat_interleave(tokens - num_visible))
        start += rows * tokens
    return torch.cat(visible + masked)

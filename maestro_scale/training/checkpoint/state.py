"""The training state (master weights, AdamW moments, moving average) as slices that any layout can load."""

from __future__ import annotations

import torch

from maestro_scale.interop.sharded_state import WEIGHT, ParameterSlice, StateReader
from maestro_scale.training.ema import EMA, WeightEMA
from maestro_scale.training.fragments import MOMENTS, ShardedState


class TrainState:
    """A rank's part of the training state. Restoring it is bitwise, on any number of ranks and any ZeRO stage."""

    def __init__(self, sharded: ShardedState, ema: WeightEMA | None) -> None:
        self.sharded, self.ema = sharded, ema

    def pieces(self) -> list[ParameterSlice]:
        """Copies of what this rank owns, on the CPU; training may continue while they are written."""
        moments = MOMENTS if self.sharded.adam_step else ()
        pieces = []
        for i, f in enumerate(self.sharded.fragments):
            first, numel = f.owned
            if numel == 0:
                continue
            values = {WEIGHT: f.weights, **{key: self.sharded.moment(f, key) for key in moments}}
            values = {key: v.narrow(0, first, numel) for key, v in values.items()}
            if self.ema is not None:
                values[EMA] = self.ema.averages[i]
            copies = {key: v.detach().to("cpu", torch.float32, copy=True) for key, v in values.items()}
            pieces.append(ParameterSlice(f.name, f.shape, f.start + first, copies))
        return pieces

    @torch.no_grad()
    def restore(self, reader: StateReader) -> None:
        """Load a state that any number of ranks has written; a collective."""
        moments = MOMENTS if reader.adam_step else ()
        if moments:
            self.sharded.begin_adam_at(reader.adam_step)
        for i, f in enumerate(self.sharded.fragments):
            f.weights.copy_(reader.read(WEIGHT, f.name, f.start, f.weights.numel()))
            for key in moments:
                self.sharded.moment(f, key).copy_(reader.read(key, f.name, f.start, f.weights.numel()))
            first, numel = f.owned
            # A finetuning of an earlier revision keeps its average in a file of its own.
            if self.ema is not None and numel and EMA in reader.kinds:
                self.ema.averages[i].copy_(reader.read(EMA, f.name, f.start + first, numel))
        self.sharded.sync_to_model()

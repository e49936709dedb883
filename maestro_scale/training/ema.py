"""The exponential moving average of the weights, sharded: each rank averages the elements that it owns, in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maestro_scale.training.distributed import World
from maestro_scale.training.fragments import Fragment, gather_into

EMA = "ema"


class WeightEMA:
    """``average = decay · average + (1 - decay) · weights`` after every ``every`` steps; starts at the initial weights.

    The weights are the fp32 masters, so that an update below half a bf16 ulp still counts. ``averages``: one tensor
    (owned elements,) per fragment, on the device of the master weights. ``warmup``: the decay of step t is at most
    t / (9 + t), because a long average would hold little but the initial weights in a short training.
    """

    def __init__(self, decay: float, fragments: list[Fragment], warmup: bool = False, every: int = 1) -> None:
        self.every = every
        self.decay, self._warmup, self._fragments = decay, warmup, fragments
        self._weights = [f.weights.narrow(0, *f.owned) for f in fragments]
        self.averages: list[Tensor] = [w.float().clone() for w in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after ``step`` (the first is 1), where it is due. No communication."""
        if step % self.every:
            return
        decay = min(self.decay, step / (9 + step)) if self._warmup else self.decay
        if self.averages:
            torch._foreach_lerp_(self.averages, [w.float() for w in self._weights], 1 - decay)

    def gather_into(self, module: nn.Module, world: World) -> None:
        """Copy the complete average into ``module``, which has the same parameters; see ``fragments.gather_into``."""
        names = {name for name, _ in module.named_parameters()}
        gather_into(module, world, self._fragments, self.averages, names)

    @torch.no_grad()
    def load_complete(self, state: Mapping[str, Tensor]) -> None:
        """Replace the average. ``state``: complete tensors by parameter name."""
        for fragment, average in zip(self._fragments, self.averages, strict=True):
            first, numel = fragment.owned
            average.copy_(state[fragment.name].view(-1).narrow(0, fragment.start + first, numel))

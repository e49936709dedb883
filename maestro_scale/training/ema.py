"""The exponential moving average of the weights: each rank averages the elements that it owns, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_scale.training.fragments import Fragment

EMA = "ema"


class Ema:
    """``average = decay · average + (1 - decay) · weights`` after every step; starts at the initial weights.

    ``averages``: one tensor (owned elements,) per fragment, where the master weights are.
    """

    def __init__(self, decay: float, fragments: list[Fragment]) -> None:
        self.decay = decay
        self._weights = [f.weights.narrow(0, *f.owned) for f in fragments]
        self.averages: list[Tensor] = [w.float().clone() for w in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the step that was just made; no communication."""
        if self.averages:
            torch._foreach_lerp_(self.averages, [w.float() for w in self._weights], 1 - self.decay)

"""Decides from the global loss and gradient norm, before the update, whether a step is skipped."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_scale.errors import MaestroError

_DECAY = 0.99  # of the running means, per step
_MIN_STEPS = 100  # before the running means are reliable enough to detect a spike


class GuardError(MaestroError):
    """Too many steps in a row were skipped; the message names the last good checkpoint."""

    same_on_all_ranks = True


@dataclass
class Guard:
    """Skips a step whose loss or gradient norm is not finite, or is ``spike`` times its running mean (0: no limit).

    The other fields are its state, stored in checkpoints under these names: running means over ``seen`` finished steps,
    and the number of steps skipped ``in_a_row``.
    """

    spike: float
    mean_loss: float = 0.0
    mean_norm: float = 0.0
    seen: int = 0
    in_a_row: int = 0

    def skip_reason(self, loss: float, norm: float) -> str | None:
        """Why a step with this loss and gradient norm must be skipped, or None. Does not change the state."""
        for name, value, mean in (("loss", loss, self.mean_loss), ("gradient norm", norm, self.mean_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            if self.spike and self.seen >= _MIN_STEPS and value > self.spike * mean:
                return f"the {name} {value:.4g} is over {self.spike:g} times its running mean {mean:.4g}"
        return None

    def refuses(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether ``skip_reason`` gives a reason, computed on the device of the tensors, both (); a bool tensor, ().

        The limits are numbers of the host, known before the step. The comparison is in fp64, as that of
        ``skip_reason``, so that both agree on every value.
        """
        values = torch.stack([loss.detach().double(), norm.detach().double()])
        refused = ~torch.isfinite(values)
        if self.spike and self.seen >= _MIN_STEPS:
            # Each with its scalar: a tensor of both limits would be copied from the host.
            over = [values[0] > self.spike * self.mean_loss, values[1] > self.spike * self.mean_norm]
            refused = refused | torch.stack(over)
        return refused.any()

    def record_step(self, loss: float, norm: float) -> None:
        """Update the means with a finished step."""
        self.seen += 1
        self.in_a_row = 0
        share = max(1 - _DECAY, 1 / self.seen)  # the arithmetic mean of the first 100 steps
        self.mean_loss += share * (loss - self.mean_loss)
        self.mean_norm += share * (norm - self.mean_norm)

    def record_skip(self) -> None:
        """Count a skipped step. It does not enter the means."""
        self.in_a_row += 1

    def state_dict(self) -> dict[str, float]:
        """Everything but ``spike``, which the recipe sets."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "spike"}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)

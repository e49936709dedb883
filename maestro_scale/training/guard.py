"""Whether a step may change the weights: judged from its global loss and gradient norm, before the optimizer runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from maestro_scale.errors import MaestroError

_MEMORY = 0.99  # of the running means, per step
_ARMED_AFTER = 100  # steps that the means are learned from before anything counts as a spike


class GuardError(MaestroError):
    """Too many steps in a row were skipped; the message names the last good checkpoint."""

    same_on_all_ranks = True


@dataclass
class Guard:
    """Skips a step whose loss or gradient norm is not finite, or is ``spike`` times its running mean (0: no limit).

    The other fields are its memory; they go into checkpoints.
    """

    spike: float
    mean_loss: float = 0.0
    mean_norm: float = 0.0
    seen: int = 0
    in_a_row: int = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """Why the step must be skipped, in words, or None. Changes nothing."""
        for name, value, mean in (("loss", loss, self.mean_loss), ("gradient norm", norm, self.mean_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            if self.spike and self.seen >= _ARMED_AFTER and value > self.spike * mean:
                return f"the {name} {value:.4g} is over {self.spike:g} times its running mean {mean:.4g}"
        return None

    def record_step(self, loss: float, norm: float) -> None:
        """Remember a step that was taken."""
        self.seen += 1
        self.in_a_row = 0
        share = max(1 - _MEMORY, 1 / self.seen)  # a plain mean at first
        self.mean_loss += share * (loss - self.mean_loss)
        self.mean_norm += share * (norm - self.mean_norm)

    def record_skip(self) -> None:
        """Remember a step that was skipped."""
        self.in_a_row += 1

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "spike"}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what a checkpoint kept."""
        for name, value in state.items():
            setattr(self, name, value)

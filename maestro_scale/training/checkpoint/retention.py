"""The retention policy of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The last ``keep`` are kept, and permanently those of steps divisible by ``keep_every`` (0: none)."""

    keep: int
    keep_every: int = 0

    def is_permanent(self, step: int) -> bool:
        """Whether a checkpoint of this step is never removed."""
        return self.keep_every > 0 and step % self.keep_every == 0

    def superseded(self, steps: Iterable[int]) -> list[int]:
        """Of these steps, those whose checkpoints can be removed."""
        temporary = [s for s in sorted(steps) if not self.is_permanent(s)]
        return temporary[: -self.keep]

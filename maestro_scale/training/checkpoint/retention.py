"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The last ``keep`` stay, and those of steps divisible by ``keep_every`` (0: none) for good."""

    keep: int
    keep_every: int = 0

    def is_permanent(self, step: int) -> bool:
        """Whether a checkpoint of this step stays for good."""
        return self.keep_every > 0 and step % self.keep_every == 0

    def superseded(self, steps: Iterable[int]) -> list[int]:
        """Of these steps, the ones whose checkpoints can go."""
        passing = [s for s in sorted(steps) if not self.is_permanent(s)]
        return passing[: -self.keep]

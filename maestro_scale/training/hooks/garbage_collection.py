"""Runs Python's garbage collector at the same step on all ranks.

The automatic collector would pause each rank at another time, and at every collective all ranks wait for the one that
is paused.
"""

from __future__ import annotations

import gc

from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.hooks.hook import FinishedStep, Hook


class GarbageCollectionHook(Hook):
    """Collects every ``every`` steps and switches the automatic collector off in between."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._was_enabled = False

    def on_start(self, position: Position, num_steps: int) -> None:
        """Collect once, then switch the automatic collector off."""
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def after_step(self, step: FinishedStep) -> bool:
        """Collect at multiples of the interval."""
        if step.position.step % self._every == 0:
            gc.collect()
        return False

    def on_end(self, reason: str) -> None:
        """Restore the automatic collector."""
        if self._was_enabled:
            gc.enable()

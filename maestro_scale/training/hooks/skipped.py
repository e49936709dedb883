"""Records skipped steps, with the keys to replay them; ends the run after too many in a row."""

from __future__ import annotations

import logging

from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.distributed import World
from maestro_scale.training.guard import Guard, GuardError
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.run_dir import JsonLines, finite

log = logging.getLogger(__name__)


class SkippedStepsHook(Hook):
    """``skipped/rankNNNNN.jsonl`` of a run: per skipped step its reason and this rank's micro-batches.

    ``keys`` of a micro-batch go to ``TrainLoader.replay``; ``finite`` says whether its own loss sums were. After
    ``max_in_a_row`` skipped steps in a row, GuardError on all ranks.
    """

    def __init__(
        self, lines: JsonLines, world: World, guard: Guard, checkpoints: Checkpoints, max_in_a_row: int
    ) -> None:
        self._lines, self._world, self._guard = lines, world, guard
        self._checkpoints, self._max_in_a_row = checkpoints, max_in_a_row

    def after_step(self, step: FinishedStep) -> bool:
        """Append a line for a skipped step."""
        if step.result.skipped is not None:
            self._record(step)
            if self._guard.in_a_row >= self._max_in_a_row:
                self._end()
        return False

    def _record(self, step: FinishedStep) -> None:
        result, number = step.result, step.position.step
        finite_sums = result.local_sums.isfinite().all(dim=1).tolist()
        batches = zip(finite_sums, step.data.batches, strict=True)
        self._lines.append(
            {
                "step": number,
                "reason": result.skipped,
                "loss": finite(result.loss),
                "grad_norm": finite(result.norm),
                "batches": [{"finite": ok, "keys": list(b.keys)} for ok, b in batches],
            }
        )
        if self._world.is_main:
            folder = self._lines.path.parent
            log.warning(
                "step %d skipped: %s; the keys of its samples are in %s", number, result.skipped, folder
            )

    def _end(self) -> None:
        # A checkpoint that is still being written is of a good step: publish it before the run ends.
        self._checkpoints.finish()
        newest, _ = self._checkpoints.latest()
        raise GuardError(
            f"{self._guard.in_a_row} steps in a row were skipped; their reasons and the keys of their samples are in "
            f"{self._lines.path.parent}. The last good checkpoint is {newest or 'none: the run had not reached one'}"
        )

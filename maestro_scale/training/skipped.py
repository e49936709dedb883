"""What becomes of skipped steps: a line and the keys to replay them; too many in a row end the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from maestro_scale.stream.batch import Batch
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import StepResult
from maestro_scale.training.guard import Guard, GuardError
from maestro_scale.training.run_dir import JsonLines, finite

log = logging.getLogger(__name__)


class SkippedSteps:
    """``skipped/rankNNNNN.jsonl`` of a run: per skipped step its reason and this rank's micro-batches.

    ``keys`` of a micro-batch go to ``TrainLoader.replay``; ``finite`` says whether its own error sums were.
    """

    def __init__(self, lines: JsonLines, world: World, guard: Guard, most_in_a_row: int) -> None:
        self._lines, self._world, self._guard, self._most = lines, world, guard, most_in_a_row

    def note(self, step: int, result: StepResult, batches: Sequence[Batch]) -> None:
        """Write down a skipped step."""
        finite_sums = result.local_sums.isfinite().all(dim=1).tolist()
        self._lines.append(
            {
                "step": step,
                "reason": result.skipped,
                "loss": finite(result.loss),
                "grad_norm": finite(result.norm),
                "batches": [
                    {"finite": ok, "keys": list(b.keys)} for ok, b in zip(finite_sums, batches, strict=True)
                ],
            }
        )
        if self._world.is_main:
            log.warning(
                "step %d skipped: %s; the keys of its samples are in %s",
                step,
                result.skipped,
                self._lines.path.parent,
            )

    def end_if_too_many(self, checkpoints: Checkpoints) -> None:
        """GuardError, on all ranks together, if the last steps in a row were all skipped."""
        if self._guard.in_a_row < self._most:
            return
        checkpoints.finish()
        newest, _ = checkpoints.latest()
        raise GuardError(
            f"{self._guard.in_a_row} steps in a row were skipped; their reasons and the keys of their samples are in "
            f"{self._lines.path.parent}. The last good checkpoint is {newest or 'none: the run had not reached one'}"
        )

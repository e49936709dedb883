"""The base class of hooks, and the finished step that they receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from maestro_scale.stream.batch import Batch
from maestro_scale.stream.loader import Step
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.engine import StepResult


@dataclass(frozen=True)
class FinishedStep:
    """One optimizer step, on one rank.

    ``position``: after the step. ``data``: with this rank's micro-batches on the host; ``batches``: their copies on the
    device; ``inputs``: the objective's, per micro-batch. ``num_terms`` (S,): of the global batch. ``wait_s``: the time
    this rank waited for data during the step: for its own where that was not prefetched, and for the next step's.
    ``metrics``: more numbers for this step's line of metrics.jsonl, which a hook may add; the same names on all ranks,
    because logging is collective.
    """

    position: Position
    data: Step
    batches: Sequence[Batch]
    inputs: Sequence[Any]
    num_terms: Tensor
    result: StepResult
    wait_s: float
    is_last: bool
    metrics: dict[str, float | None] = field(default_factory=dict)


class Hook:
    """Called on all ranks, in the order of the trainer's list, which is the same on all ranks.

    A hook may therefore use collectives, and what it decides (``finished``, the result of ``after_step``) must be the
    same on all ranks. It must not change weights, gradients or data: a run with a hook equals a run without it,
    bit by bit. State that a resumed run needs goes into ``state_dict``, which a checkpoint stores.
    """

    name = ""
    """Key of the hook's state in a checkpoint; empty: it has none."""

    @property
    def finished(self) -> bool:
        """Whether the training ends before its last step."""
        return False

    def on_start(self, position: Position, num_steps: int) -> None:
        """The training starts, or resumes, at ``position``."""

    def after_step(self, step: FinishedStep) -> bool:
        """Called after each step. Returns whether a checkpoint must be written now."""
        return False

    def after_commit(self, position: Position) -> None:
        """The checkpoint of ``position`` is committed: files that only older checkpoints need can be removed."""

    def on_end(self, reason: str) -> None:
        """The training is over: ``done``, ``stopped`` or ``failed``. Not collective: after an error a rank is alone."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""

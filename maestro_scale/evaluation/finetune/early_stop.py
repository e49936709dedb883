"""Early stopping and selection of the best weights, from the validation scores so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ValidationScore:
    """A score on the validation split of the weights after ``step``.

    ``weights``: their digest where they were the best so far; empty in checkpoints of earlier revisions.
    """

    step: int
    score: float
    weights: str = ""


def best(history: Sequence[ValidationScore], sign: int = 1) -> ValidationScore:
    """The best score; of equal ones the earliest. ``sign``: of the metric, -1 where a lower score is better."""
    return max(history, key=lambda v: (sign * v.score, -v.step))


def exhausted(history: Sequence[ValidationScore], patience: int, sign: int = 1) -> bool:
    """Whether the last ``patience`` scores were all no better than one before them; never with patience 0."""
    if not history or patience == 0:
        return False
    at = history.index(best(history, sign))
    return len(history) - 1 - at >= patience


def due(step: int, num_steps: int, validations: int) -> bool:
    """Whether validation follows ``step``: ``validations`` times at most, evenly spread, the last step's included."""
    every = -(-num_steps // validations)
    return step % every == 0 or step == num_steps

"""Which dataset a step draws from: exact, the same on every rank, and computed at any step without replay."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Steps shared out by weight.

    Of the first s steps, floor(r · s) go to the first dataset, r being its share of the weights; the steps
    that are left go to the others in the same way. So at any time each of K datasets is less than K steps off
    its share. Weights are read as decimals (0.1 is a tenth) and kept as fractions: no rounding, however long
    the run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(w)) for w in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"weights of a mixture must be positive and at least one; got {list(weights)}")
        self._rates = [w / sum(exact[i:]) for i, w in enumerate(exact)]

    def at(self, step: int) -> tuple[int, int]:
        """(dataset, how many earlier steps drew from it) for step ``step``, counted from 0."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        for dataset, rate in enumerate(self._rates):
            before = rate * step // 1
            if rate * (step + 1) // 1 > before:
                return dataset, before
            step -= before
        raise AssertionError("the last rate is 1, so it takes every step that is left")

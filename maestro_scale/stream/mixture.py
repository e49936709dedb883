"""Schedule of a mixture: the dataset of each step, exact, equal on all ranks, and computed for any step directly.

The tiles of a dataset that have different sensors are scheduled in the same way, within the steps of the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Distributes steps over datasets by weight.

    Of the first s steps, floor(r · s) use the first dataset, r being its share of the weights; the remaining steps are
    distributed over the other datasets in the same way. So each of K datasets is always less than K steps off its
    share. It is a schedule and not a random choice because all ranks must run the same dataset at a step
    (invariant 5). Weights are parsed as decimals (0.1 is 1/10) and kept as fractions, so that rounding never moves a
    step, however long the run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(w)) for w in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"weights of a mixture must be positive and at least one; got {list(weights)}")
        self._rates = [w / sum(exact[i:]) for i, w in enumerate(exact)]

    def at(self, step: int) -> tuple[int, int]:
        """(dataset, number of earlier steps that used it) of step ``step``, counted from 0."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        for dataset, rate in enumerate(self._rates):
            before = rate * step // 1
            if rate * (step + 1) // 1 > before:
                return dataset, before
            step -= before
        raise AssertionError("the last rate is 1, so the last dataset takes every remaining step")


class NestedMixture:
    """A mixture of datasets, each of one or more parts.

    ``weights``: of the datasets. ``steps[dataset]``: steps per epoch of each of its parts. Of every sum(steps[dataset])
    steps of a dataset, which are its epoch, each part has exactly its own number, evenly spread.
    """

    def __init__(self, weights: Sequence[float], steps: Sequence[Sequence[int]]) -> None:
        self._datasets = Mixture(weights)
        self._parts = [Mixture(counts) for counts in steps]
        self._firsts = [sum(map(len, steps[:i])) for i in range(len(steps))]

    def at(self, step: int) -> tuple[int, int]:
        """(part, counted over all datasets; number of earlier steps that used it) of step ``step``, from 0."""
        dataset, of_dataset = self._datasets.at(step)
        part, of_part = self._parts[dataset].at(of_dataset)
        return self._firsts[dataset] + part, of_part

"""Verdicts on claims from an estimated difference, and the number of seeds or tiles that would decide an open one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from maestro_scale.evaluation.paired import Component, Estimate, t_quantile, t_tail

Word = Literal[
    "holds",
    "opposite",
    "smaller",
    "matches",
    "differs",
    "not resolved",
    "same cells",
    "no result",
    "not evaluated",
]
"""``same cells``: both sides are the same, as where their levels set what the recipe has anyway. ``no result``: not
yet. ``not evaluated``: the study has no cell or evaluation of the question."""

NO_COMPARISON = ("same cells", "not evaluated")
"""Verdicts that do not change when more cells are finished."""

POWER = 0.8
"""Probability that the stated number of seeds or tiles decides, if the observed difference is the true one."""
_MAX_SEEDS = 10_000
_MAX_TILES = 100_000_000


@dataclass(frozen=True)
class Verdict:
    """What a difference says about a claim."""

    word: Word
    p_value: float | None = None
    """Of the hypothesis at the border of the claim; below 1 - level exactly where the verdict is resolved."""
    needed_seeds: int | None = None
    """With the same tiles; None where no number of seeds is enough, or the claim is decided."""
    needed_tiles: int | None = None
    """With the same seeds; None where no number of tiles is enough, or the claim is decided."""
    adjusted_p: float | None = None
    """``p_value`` after Holm's correction for the number of questions."""

    @property
    def is_resolved(self) -> bool:
        """Whether the interval lies on one side of the border."""
        return self.word not in ("not resolved", "no result", *NO_COMPARISON)


def judge(difference: Estimate, at_least: float = 0.0, margin: float | None = None) -> Verdict:
    """The verdict on the claim that ``difference`` exceeds ``at_least``, or, with ``margin``, lies within ±margin.

    ``holds``: the interval lies above ``at_least``; ``opposite``: below it and below 0; ``smaller``: below
    ``at_least``, but not below 0. ``matches``: within ±margin; ``differs``: outside. Otherwise, and always with a
    single seed, whose interval does not cover the variation of training, ``not resolved``.
    """
    power = POWER
    if margin is None:
        p_value = difference.p_value(at_least)
        distance = abs(difference.value - at_least)
        word = _of_difference(difference, at_least)
    else:
        p_value = _equivalence_p(difference, margin)
        distance = abs(margin - abs(difference.value))
        if abs(difference.value) < margin:  # both of two one-sided tests must decide
            power = (1 + POWER) / 2
        word = _of_equivalence(difference, margin)
    if word != "not resolved" and difference.covers_seeds:
        return Verdict(word, p_value)
    if not difference.covers_seeds:
        return Verdict("not resolved")
    if not distance:  # no number of seeds decides
        return Verdict("not resolved", p_value)
    seeds, tiles = min(difference.num_seeds), difference.num_tiles
    return Verdict(
        "not resolved",
        p_value,
        _smallest(lambda m: _decides(difference, distance, power, m / seeds, 1), seeds + 1, _MAX_SEEDS),
        _smallest(lambda n: _decides(difference, distance, power, 1, n / tiles), tiles + 1, _MAX_TILES),
    )


def adjust(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts with p values after Holm (1979): the i-th smallest of m is multiplied by m - i + 1, and none is
    below that of a smaller one. m counts the questions that have no p value yet too, so that no value grows when their
    cells are finished, but not those without a comparison."""
    order = sorted((v.p_value, i) for i, v in enumerate(verdicts) if v.p_value is not None)
    number = sum(v.word not in NO_COMPARISON for v in verdicts)
    adjusted = list(verdicts)
    highest = 0.0
    for rank, (p_value, i) in enumerate(order):
        highest = max(highest, min(1.0, (number - rank) * p_value))
        adjusted[i] = dataclasses.replace(verdicts[i], adjusted_p=highest)
    return adjusted


def scaled(difference: Estimate, seeds: float, tiles: float) -> Estimate:
    """The estimate with ``seeds`` times as many seeds and ``tiles`` times as many tiles.

    With σ² as in :mod:`..evaluation.paired`: σ²_seed / S + σ²_tile / T + σ²_inter / (S·T); a component that is
    estimated below 0 is 0. Degrees of freedom grow with what they are of.
    """
    inter = difference.inter.variance
    seed = max(difference.seed.variance - inter, 0.0) / seeds + inter / (seeds * tiles)
    tile = max(difference.tile.variance - inter, 0.0) / tiles + inter / (seeds * tiles)
    return dataclasses.replace(
        difference,
        seed=Component(seed, _scaled_freedom(difference.seed.freedom, seeds, min(difference.num_seeds))),
        tile=Component(tile, _scaled_freedom(difference.tile.freedom, tiles, difference.num_tiles)),
        inter=Component(inter / (seeds * tiles), difference.inter.freedom * seeds * tiles),
    )


def _of_difference(difference: Estimate, at_least: float) -> Word:
    if difference.low > at_least:
        return "holds"
    if difference.high < min(at_least, 0.0):
        return "opposite"
    return "smaller" if difference.high < at_least else "not resolved"


def _of_equivalence(difference: Estimate, margin: float) -> Word:
    if -margin < difference.low and difference.high < margin:
        return "matches"
    if difference.low > margin or difference.high < -margin:
        return "differs"
    return "not resolved"


def _equivalence_p(difference: Estimate, margin: float) -> float:
    """Two one-sided tests (Schuirmann 1987), each at half of the two-sided level, as the interval is two-sided; beyond
    the margin the p value of a difference of the margin."""
    inside = margin - abs(difference.value)
    if not difference.error:
        return float(inside == 0)
    return min(1.0, 2 * t_tail(abs(inside) / difference.error, difference.freedom))


def _decides(difference: Estimate, distance: float, power: float, seeds: float, tiles: float) -> bool:
    """Whether that many times the seeds and tiles decide with probability POWER: the usual condition for the size of a
    sample, (t_{1-α/2} + t_{power}) · error ≤ distance (Chow, Shao and Wang 2008, section 3.1). For equivalence
    ``power`` is (1 + POWER) / 2: each of the two one-sided tests may fail in half of the other cases."""
    larger = scaled(difference, seeds, tiles)
    quantiles = (t_quantile(p, larger.freedom) for p in ((1 + larger.level) / 2, power))
    return sum(quantiles) * larger.error <= distance


def _scaled_freedom(freedom: float, times: float, number: int) -> float:
    """Degrees of freedom of a variance estimated from ``number`` draws, for ``times`` as many."""
    return freedom if math.isinf(freedom) else freedom * (number * times - 1) / (number - 1)


def _smallest(decides: Callable[[int], bool], low: int, highest: int) -> int | None:
    """The smallest number from ``low`` on that decides; None if ``highest`` does not."""
    high = low
    while not decides(high):
        if high >= highest:
            return None
        low, high = high + 1, min(2 * high, highest)
    while low < high:
        middle = (low + high) // 2
        if decides(middle):
            high = middle
        else:
            low = middle + 1
    return low

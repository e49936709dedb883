"""Verdicts and the seeds or tiles that would decide, with values computed by hand from tables of t."""

from __future__ import annotations

import dataclasses
import math

import pytest

from maestro_scale.evaluation.paired import Component, Estimate
from maestro_scale.study.verdict import Verdict, adjust, judge, scaled

NONE = Component(0.0, math.inf)


def seeds_only(value: float, error: float = 0.02, num_seeds: int = 5) -> Estimate:
    """A difference that varies with the seed alone: of 5 seeds the interval is ±2.7764 errors."""
    return Estimate(value, Component(error**2, num_seeds - 1), NONE, NONE, (num_seeds,), 1000, True, True)


def tiles_only(value: float, error: float = 0.02, num_tiles: int = 100) -> Estimate:
    """A difference that varies with the tiles alone."""
    return Estimate(value, NONE, Component(error**2, num_tiles - 1), NONE, (5,), num_tiles, True, True)


@pytest.mark.parametrize(
    ("value", "at_least", "word"),
    [
        (0.06, 0.0, "holds"),  # 0.0045 to 0.1155
        (0.05, 0.0, "not resolved"),  # -0.0055 to 0.1055
        (-0.06, 0.0, "opposite"),
        (0.06, 0.02, "not resolved"),
        (0.08, 0.02, "holds"),
        (0.06, 0.12, "smaller"),
        (0.0, 0.1, "smaller"),
        (-0.06, 0.1, "opposite"),
        (0.0, -0.06, "holds"),  # not worse by 6 points
        (-0.06, -0.06, "not resolved"),
        (-0.06, -0.002, "opposite"),
        (-0.1, -0.04, "opposite"),
    ],
)
def test_claims_of_a_difference(value, at_least, word):
    verdict = judge(seeds_only(value), at_least)
    assert verdict.word == word
    assert (verdict.p_value < 0.05) == verdict.is_resolved == (word != "not resolved")


@pytest.mark.parametrize(
    ("value", "margin", "word"),
    [
        (0.0, 0.056, "matches"),  # ±0.0555
        (0.0, 0.055, "not resolved"),
        (0.01, 0.06, "not resolved"),
        (0.1, 0.04, "differs"),
        (-0.1, 0.04, "differs"),
        (-0.1, 0.05, "not resolved"),
    ],
)
def test_claims_of_equivalence(value, margin, word):
    verdict = judge(seeds_only(value), margin=margin)
    assert verdict.word == word
    assert (verdict.p_value < 0.05) == (word != "not resolved")


def test_the_p_value_is_that_of_t():
    # 4.6041 is the 0.995 quantile of t with 4 degrees of freedom.
    assert judge(seeds_only(0.02 * 4.60409)).p_value == pytest.approx(0.01, abs=1e-6)


def test_the_seeds_that_would_decide():
    # (t_0.975 + t_0.8) · 0.02 · √(5/m) ≤ 0.03: with 19 seeds (2.1009 + 0.8620) · 0.01026 = 0.0304, with 20 seeds
    # (2.0930 + 0.8610) · 0.01 = 0.0295.
    verdict = judge(seeds_only(0.03))
    assert verdict.word == "not resolved"
    assert (verdict.needed_seeds, verdict.needed_tiles) == (20, None)
    # The distance to the border counts: of -0.01 to 0.02 it is the same.
    assert judge(seeds_only(-0.01), at_least=0.02).needed_seeds == 20
    # Beyond a margin too, of which one border counts.
    assert judge(seeds_only(0.07), margin=0.04).needed_seeds == 20


def test_the_seeds_and_tiles_that_would_show_equivalence():
    # Chow, Shao and Wang: (t_0.975 + t_0.9) · 0.02 · √(5/m) ≤ 0.04 - |0.01|, as two one-sided tests must decide:
    # with 25 seeds (2.0639 + 1.3178) · 0.008944 = 0.03025, with 26 seeds (2.0595 + 1.3163) · 0.008771 = 0.02961.
    assert judge(seeds_only(0.01), margin=0.04).needed_seeds == 26
    assert judge(seeds_only(-0.01), margin=0.04).needed_seeds == 26
    # (1.9600 + 1.2816)² · 0.2² / 0.03² = 467.0 tiles; with t of 468 degrees of freedom (1.9650 + 1.2834)² · 44.44 =
    # 469.0. At a difference of 0 the number of a one-sided claim, 351, is 1.34 times too small.
    assert judge(tiles_only(0.0), margin=0.03).needed_tiles == 469


def test_the_tiles_that_would_decide():
    # With the normal distribution (1.9600 + 0.8416)² · 0.2² / 0.03² = 348.8 tiles; with t of 350 degrees of freedom
    # (1.9668 + 0.8428)² · 44.44 = 350.8.
    verdict = judge(tiles_only(0.03))
    assert (verdict.needed_seeds, verdict.needed_tiles) == (None, 351)


def test_either_may_be_too_little_alone():
    both = dataclasses.replace(tiles_only(0.01), seed=Component(0.02**2, 4))
    verdict = judge(both)
    assert verdict.word == "not resolved"
    assert (verdict.needed_seeds, verdict.needed_tiles) == (None, None)
    assert judge(seeds_only(0.0)).needed_seeds is None


def test_an_interaction_shrinks_with_both():
    found = Estimate(
        0.01, Component(5e-4, 4), Component(3e-4, 99), Component(1e-4, 396), (5,), 100, True, True
    )
    assert found.total.variance == pytest.approx(7e-4)
    assert scaled(found, 1, 1).total.variance == pytest.approx(7e-4)
    # 4e-4 of the seeds, 2e-4 of the tiles, 1e-4 of both.
    assert scaled(found, 2, 1).total.variance == pytest.approx(2e-4 + 2e-4 + 0.5e-4)
    assert scaled(found, 2, 4).total.variance == pytest.approx(2e-4 + 0.5e-4 + 1e-4 / 8)
    assert scaled(found, 2, 1).seed.freedom == pytest.approx(9)
    assert scaled(found, 1, 2).tile.freedom == pytest.approx(199)


def test_a_single_seed_decides_nothing():
    one = dataclasses.replace(tiles_only(0.5), num_seeds=(1, 5))
    assert judge(one) == Verdict("not resolved")


def test_no_variation_at_all():
    same = Estimate(0.0, NONE, NONE, NONE, (5,), 10, True, True)
    assert judge(same) == Verdict("not resolved", 1.0)
    assert judge(same, margin=0.01).word == "matches"
    assert judge(dataclasses.replace(same, value=0.1)) == Verdict("holds", 0.0)


def test_p_values_are_adjusted_after_holm():
    verdicts = [Verdict("holds", p) for p in (0.04, 0.01, 0.03)]
    verdicts.insert(1, Verdict("same cells"))
    # 3 · 0.01, 2 · 0.03, and 0.04, which is not below 0.06.
    assert [v.adjusted_p for v in adjust(verdicts)] == [
        pytest.approx(0.06),
        None,
        pytest.approx(0.03),
        pytest.approx(0.06),
    ]
    # A question whose cells are not finished counts: 2 · 0.01. One that is not evaluated never has a p value.
    open_ones = [Verdict("holds", 0.01), Verdict("no result"), Verdict("not evaluated")]
    assert adjust(open_ones)[0].adjusted_p == pytest.approx(0.02)
    assert adjust([Verdict("not resolved", 0.6), Verdict("not resolved", 0.7)])[0].adjusted_p == 1

"""The schedule of datasets in a mixture."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale.stream.mixture import Mixture

WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 1.0, 1.5, 2.0, 3.0, 7.7, 100.0]), min_size=1, max_size=5)


@given(WEIGHTS)
def test_counts_equal_counting_and_are_never_a_step_off_per_dataset(weights: list[float]):
    mixture = Mixture(weights)
    used = [0] * len(weights)
    exact = [Fraction(str(w)) for w in weights]
    for step in range(200):
        dataset, before = mixture.at(step)
        assert before == used[dataset]
        used[dataset] += 1
        for count, weight in zip(used, exact, strict=True):
            assert abs(count - (step + 1) * weight / sum(exact)) < len(weights)


@given(WEIGHTS, st.integers(0, 10**18))
def test_late_steps_are_counted_exactly(weights: list[float], start: int):
    mixture = Mixture(weights)
    used: dict[int, int] = {}
    for step in range(start, start + 50):
        dataset, before = mixture.at(step)
        assert used.get(dataset, before) == before
        used[dataset] = before + 1


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0]])
def test_weights_must_be_positive(weights: list[float]):
    with pytest.raises(ValueError, match="weights of a mixture"):
        Mixture(weights)


def test_steps_go_to_datasets_as_counted_by_hand():
    # Of s steps floor(s / 2) go to the first; of the others floor(2 / 3) to the second, the rest to the third.
    mixture = Mixture([3.0, 2.0, 1.0])
    assert [mixture.at(step) for step in range(8)] == [
        (2, 0), (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (2, 1), (0, 3)
    ]  # fmt: skip


def test_weights_are_decimals():
    # 0.7 and 0.1 as floats are not in the ratio of 7 to 1: the 8,000th step would go to the other dataset.
    mixture = Mixture([0.7, 0.1])
    assert mixture.at(8 * 10**18 - 1) == (0, 7 * 10**18 - 1)
    with pytest.raises(ValueError, match="step -1 is negative"):
        mixture.at(-1)

"""Random numbers by what they are for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale.stream.rng import Draws, Purpose, stream_of

WORD = st.integers(0, 2**64 - 1)


@given(WORD, WORD, WORD, WORD, st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_numbers_are_philox_at_a_place(
    seed: int, first: int, second: int, third: int, dataset: int, count: int
):
    draws = Draws(seed, Purpose.SAMPLE, dataset)
    draws.seek(5).words(3)  # leaves nothing behind
    words = draws.seek(first, second, third).words(count)
    key = np.array([seed, (2 << 32) + dataset], np.uint64)
    counter = np.array([0, third, second, first], np.uint64)
    assert words.tolist() == np.random.Philox(key=key, counter=counter).random_raw(count).tolist()


def test_the_numbers_stay_what_they_were():
    # A change here changes every sample of every run in progress.
    draws = Draws(7, Purpose.SAMPLE, 1).seek(2, 3, stream_of("s2"))
    assert [draws.below(1000) for _ in range(4)] == [606, 190, 161, 250]
    np.testing.assert_array_equal(
        draws.uniforms(3), np.float32([0.44224101305007935, 0.34378582239151, 0.6753972768783569])
    )


def test_purposes_datasets_and_places_share_no_numbers():
    words = [Draws(0, p, d).seek(e).words(4) for p in Purpose for d in range(3) for e in range(3)]
    assert len(np.unique(np.concatenate(words))) == 4 * 27


@given(st.integers(1, 50), WORD)
def test_a_permutation_holds_everything_once(count: int, seed: int):
    assert sorted(Draws(seed, Purpose.ORDER).permutation(count).tolist()) == list(range(count))


def test_below_is_even():
    draws = Draws(0, Purpose.SAMPLE)
    counts = Counter(draws.below(5) for _ in range(5000))
    assert counts.keys() == set(range(5))
    assert all(n == pytest.approx(1000, abs=120) for n in counts.values())


@pytest.mark.parametrize("count", [0, 1, 2, 999])
def test_uniforms_are_floats_below_one(count: int):
    values = Draws(0, Purpose.SAMPLE).uniforms(count)
    assert values.shape == (count,)
    assert values.dtype == np.float32
    assert ((values >= 0) & (values < 1)).all()


def test_names_have_streams_of_their_own_apart_from_the_common_one():
    assert len({0} | {stream_of(n) for n in ("aerial", "s2", "s1_asc", "s1_des", "")}) == 6

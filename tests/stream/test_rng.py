"""Counter-based random numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale.stream.rng import CounterRNG, Purpose, stream_id

WORD = st.integers(0, 2**64 - 1)


@given(WORD, WORD, WORD, WORD, st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_numbers_are_philox_at_a_counter(
    seed: int, first: int, second: int, third: int, dataset: int, count: int
):
    rng = CounterRNG(seed, Purpose.SAMPLE, dataset)
    rng.seek(5).words(3)  # leaves nothing behind
    words = rng.seek(first, second, third).words(count)
    key = np.array([seed, (2 << 32) + dataset], np.uint64)
    counter = np.array([0, third, second, first], np.uint64)
    assert words.tolist() == np.random.Philox(key=key, counter=counter).random_raw(count).tolist()


def test_the_numbers_stay_what_they_were():
    # A change here changes every sample of every run in progress.
    rng = CounterRNG(7, Purpose.SAMPLE, 1).seek(2, 3, stream_id("s2"))
    assert [rng.below(1000) for _ in range(4)] == [606, 190, 161, 250]
    np.testing.assert_array_equal(
        rng.uniforms(3), np.float32([0.44224101305007935, 0.34378582239151, 0.6753972768783569])
    )


def test_purposes_datasets_and_positions_share_no_numbers():
    words = [CounterRNG(0, p, d).seek(e).words(4) for p in Purpose for d in range(3) for e in range(3)]
    assert len(np.unique(np.concatenate(words))) == 4 * 27


@given(st.integers(1, 50), WORD)
def test_a_permutation_holds_everything_once(count: int, seed: int):
    assert sorted(CounterRNG(seed, Purpose.ORDER).permutation(count).tolist()) == list(range(count))


def test_below_is_even():
    rng = CounterRNG(0, Purpose.SAMPLE)
    counts = Counter(rng.below(5) for _ in range(5000))
    assert counts.keys() == set(range(5))
    assert all(n == pytest.approx(1000, abs=120) for n in counts.values())


@pytest.mark.parametrize("count", [0, 1, 2, 999])
def test_uniforms_are_floats_below_one(count: int):
    values = CounterRNG(0, Purpose.SAMPLE).uniforms(count)
    assert values.shape == (count,)
    assert values.dtype == np.float32
    assert ((values >= 0) & (values < 1)).all()


def test_names_have_streams_of_their_own_apart_from_the_common_one():
    assert len({0} | {stream_id(n) for n in ("aerial", "s2", "s1_asc", "s1_des", "")}) == 6


def test_numbers_are_computed_from_words_as_documented():
    class Words(CounterRNG):
        def __init__(self, *words: int) -> None:
            self._left = list(words)
            self._philox = self

        def random_raw(self, count: int | None = None) -> np.ndarray | int:
            taken, self._left = self._left[: count or 1], self._left[count or 1 :]
            return np.array(taken, np.uint64) if count is not None else taken[0]

    # below: floor(word * limit / 2**64).
    assert [Words(w).below(10) for w in (0, 2**64 - 1, 2**63, 2**63 - 1)] == [0, 9, 5, 4]
    # uniforms: the low half of a word first, its 24 highest bits over 2**24.
    assert Words((2**31) + (3 << 62), 2**40 - 1).uniforms(3).tolist() == [0.5, 0.75, 1 - 2.0**-24]
    # permutation: the places of the words in ascending order, the earlier of equal ones first.
    assert Words(30, 10, 20, 10).permutation(4).tolist() == [1, 3, 2, 0]


def test_the_values_of_purposes_and_streams_stay_what_they_were():
    assert [(p.name, p.value) for p in Purpose] == [("ORDER", 1), ("SAMPLE", 2), ("REPLACEMENT", 3)]
    # The first 8 bytes of the name's sha256, little-endian, with the lowest bit set.
    assert stream_id("s2") == 0x2AB318AA468832AD
    assert stream_id("s1") == 0x87E1EE823C16BCE9  # e8 bc 16 3c 82 ee e1 87, and e8 becomes e9


def test_a_stream_is_named_by_one_two_or_three_numbers_the_rest_being_zero():
    words = CounterRNG(9, Purpose.SAMPLE, 0).seek(5, 0, 0).words(4).tolist()
    assert CounterRNG(9, Purpose.SAMPLE).seek(5).words(4).tolist() == words
    words = CounterRNG(9, Purpose.SAMPLE).seek(5, 6, 0).words(4).tolist()
    assert CounterRNG(9, Purpose.SAMPLE).seek(5, 6).words(4).tolist() == words


@pytest.mark.parametrize(("count", "words"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)])
def test_two_uniforms_use_one_word(count: int, words: int):
    # The numbers drawn next depend on it.
    rng = CounterRNG(0, Purpose.SAMPLE).seek(1)
    all_words = rng.words(5).tolist()
    rng.seek(1).uniforms(count)
    assert rng.words(3).tolist() == all_words[words : words + 3]

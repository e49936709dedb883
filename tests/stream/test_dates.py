"""Selection of dates from a series, and imputation of NaN."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale.stream import dates
from maestro_scale.stream.rng import CounterRNG, Purpose


def series(num_dates: int) -> np.ndarray:
    """(T, 1, 2, 2) float32, every pixel of a date being its number."""
    return np.broadcast_to(
        np.arange(num_dates, dtype=np.float32)[:, None, None, None], (num_dates, 1, 2, 2)
    ).copy()


def drawn(
    pixels: np.ndarray,
    num_dates: int,
    number: int,
    marked: np.ndarray | None = None,
    first_date: dates.FirstDate = "any",
) -> np.ndarray:
    rng = CounterRNG(0, Purpose.SAMPLE).seek(0, number)
    chosen, seen = dates.draw(len(pixels), num_dates, marked, lambda i: pixels[i], rng, first_date)
    np.testing.assert_array_equal(seen, pixels[chosen])
    return chosen


@given(st.integers(2, 40), st.sampled_from(["any", "ends"]), st.data())
def test_one_date_of_each_bin(stored: int, first_date: dates.FirstDate, data: st.DataObject):
    num_dates = data.draw(st.integers(1, stored - 1))
    marked = np.array(data.draw(st.lists(st.booleans(), min_size=stored, max_size=stored)))
    chosen = drawn(series(stored), num_dates, data.draw(st.integers(0, 99)), marked, first_date)
    size, rest = stored // num_dates, stored % num_dates
    possible = [
        dates.bins(stored, num_dates, skip)
        for skip in (range(rest + 1) if first_date == "any" else (0, rest))
    ]
    fitting = [b for b in possible if all(c in row for c, row in zip(chosen, b, strict=True))]
    assert fitting
    assert any(
        all(not marked[c] or marked[row].all() for c, row in zip(chosen, b, strict=True)) for b in fitting
    )
    assert size == fitting[0].shape[1]


def test_the_rest_is_left_out_at_either_end_and_all_else_is_equally_likely():
    counts = Counter(int(c) for n in range(4000) for c in drawn(series(7), 2, n, first_date="ends"))
    # Bins are {0,1,2},{3,4,5} or {1,2,3},{4,5,6}, each with probability 1/2.
    expected = {0: 1 / 6, 1: 1 / 3, 2: 1 / 3, 3: 1 / 3, 4: 1 / 3, 5: 1 / 3, 6: 1 / 6}
    for date, share in expected.items():
        assert counts[date] / 4000 == pytest.approx(share, abs=0.03)


def test_the_first_date_of_the_bins_is_any_of_the_rest():
    # Of 5 dates, 3 are bins of one: they begin at date 0, 1 or 2, each with probability 1/3.
    draws = [tuple(drawn(series(5), 3, n)) for n in range(3000)]
    assert set(draws) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert all(1000 - 80 < count < 1000 + 80 for count in Counter(draws).values())
    at_ends = [tuple(drawn(series(5), 3, n, first_date="ends")) for n in range(200)]
    assert set(at_ends) == {(0, 1, 2), (2, 3, 4)}


@pytest.mark.parametrize(
    ("word", "first"), [(0, 0), (0x3F, 0), (0x40, 1), (0x7F, 1), (0x80, 2), (0xC0, 3), (0xFF, 3)]
)
def test_the_last_word_is_the_first_date(word, first):
    # A rest of 3: a quarter of the words for each of 0 … 3. Bins have one date, so the other words do not matter.
    class Words:
        def words(self, count: int) -> np.ndarray:
            assert count == 7 + 1
            return np.array([0] * 7 + [word << 56], np.uint64)

    chosen, _ = dates.draw(7, 4, None, lambda i: series(7)[i], Words())
    assert chosen.tolist() == [first, first + 1, first + 2, first + 3]


def test_dates_with_clouds_or_nan_are_drawn_only_if_their_bin_has_no_other():
    pixels = series(8)
    pixels[1, 0, 0, 0] = np.nan  # bin 0: a cloud, a NaN, one clear date
    pixels[4:, 0, 1, 1] = np.nan  # bin 1: nothing but NaN, half of it cloudy
    marked = np.array([1, 0, 0, 1, 1, 1, 0, 0], bool)
    chosen = np.array([drawn(pixels, 2, n, marked) for n in range(100)])
    assert set(chosen[:, 0]) == {2}
    assert set(chosen[:, 1]) == {6, 7}
    pixels[2] = np.nan  # bin 0 has no clear date left: its marks no longer count
    assert {drawn(pixels, 2, n, marked)[0] for n in range(100)} == {0, 3}


def test_only_the_dates_that_are_used_are_read():
    asked = []
    pixels = series(146).astype(np.int16)

    def read(indices: np.ndarray) -> np.ndarray:
        asked.extend(indices.tolist())
        return pixels[indices]

    dates.draw(146, 16, np.zeros(146, bool), read, CounterRNG(0, Purpose.SAMPLE))
    assert len(asked) == 16


def test_evaluation_selects_the_date_nearest_to_the_median():
    pixels = np.array([9, 0, 5, 1, 7, 7], np.float32).reshape(6, 1, 1, 1)
    assert dates.nearest_to_median(pixels, None, 2, 0).tolist() == [2, 4]  # the first of equals


def test_evaluation_leaves_marked_pixels_out_of_the_median_and_their_dates_out_of_the_choice():
    pixels = np.array([1, 2, 50, 60, 70], np.float32).reshape(5, 1, 1, 1)
    mask = np.array([0, 0, 90, 90, 90], np.uint8).reshape(5, 1, 1, 1)
    assert dates.nearest_to_median(pixels, None, 1, 0).tolist() == [2]
    assert dates.nearest_to_median(pixels, mask, 1, 0).tolist() == [0]
    assert dates.nearest_to_median(pixels, mask, 1, 95).tolist() == [2]
    everywhere = np.full_like(mask, 10)
    assert dates.nearest_to_median(pixels, everywhere, 1, 0).tolist() == [2]


def test_evaluation_accepts_a_bin_of_nan_only():
    pixels = series(6)
    pixels[:3] = np.nan
    pixels[3:, 0, 0, 0] = np.nan
    assert dates.nearest_to_median(pixels, None, 2, 0).tolist() == [0, 4]


def test_the_median_is_numpys():
    values = np.random.default_rng(0).random((3, 6, 2, 4, 4)).astype(np.float32)
    values[np.random.default_rng(1).random(values.shape) < 0.3] = np.nan
    np.testing.assert_array_equal(dates._nan_median(values), np.nanmedian(values, axis=1))


@pytest.mark.parametrize(("stored", "expected"), [(1, [0, 0, 0, 0]), (3, [0, 0, 1, 2]), (4, [0, 1, 2, 3])])
def test_too_few_dates_are_repeated_in_order(stored: int, expected: list[int]):
    assert dates.spread_evenly(stored, 4).tolist() == expected


def test_nan_becomes_the_nearest_date_then_the_mean_of_the_band():
    pixels = series(4)
    pixels[:, 0, 0, 0] = np.nan
    pixels[1, 0, 1, 1] = np.nan
    filled, count = dates.fill_nan(pixels[[1, 3]], np.array([1, 3]), lambda: pixels)
    assert count == 2
    finite_mean = np.nanmean(pixels)
    np.testing.assert_allclose(
        filled[:, 0], [[[finite_mean, 1], [1, 0]], [[finite_mean, 3], [3, 3]]], rtol=1e-6
    )


def test_a_series_of_nan_becomes_zero():
    pixels = np.full((2, 1, 2, 2), np.nan, np.float32)
    filled, count = dates.fill_nan(pixels, np.arange(2), lambda: pixels)
    assert count == 2
    assert not filled.any()


def test_pixels_without_nan_are_unchanged_and_the_series_is_not_read():
    def never() -> np.ndarray:
        raise AssertionError("read for nothing")

    for dtype in ("uint8", "int16", "float32"):
        pixels = series(2).astype(dtype)
        assert dates.fill_nan(pixels, np.arange(2), never) == (pixels, 0)


def test_a_date_is_marked_only_above_the_threshold():
    mask = np.array([[49, 50], [51, 0], [50, 50]], np.uint8).reshape(3, 2, 1, 1)
    assert dates.is_marked(mask, 50.0).tolist() == [False, True, False]
    assert dates.is_marked(mask, 0.0).tolist() == [True, True, True]
    assert dates.is_marked(np.zeros((1, 2, 1, 1), np.uint8), 0.0).tolist() == [False]


def test_evaluation_leaves_out_only_pixels_above_the_threshold():
    # The median of all is 50, the third date; of the first two alone 1.5, nearest to which the first of equals is.
    pixels = np.array([1, 2, 50, 60, 70], np.float32).reshape(5, 1, 1, 1)
    mask = np.array([0, 0, 90, 90, 90], np.uint8).reshape(5, 1, 1, 1)
    assert dates.nearest_to_median(pixels, mask, 1, 90.0).tolist() == [2]
    assert dates.nearest_to_median(pixels, mask, 1, 89.0).tolist() == [0]


def test_bins_follow_the_dates_that_are_left_out():
    assert dates.bins(7, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert dates.bins(7, 2, skip=1).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_drawn_dates_are_computed_from_the_words():
    # Two of 7 dates of samples 0 to 7, by 8 words of Philox: key (0, 2 << 32), counter (0, 0, sample, 0).
    # The last word decides whether the first date (at or above 2**63) or the last one is left out; of each bin of three
    # the date of the lowest word is taken. Samples 1 and 2 leave out the first.
    expected = [[1, 5], [1, 6], [3, 6], [1, 5], [2, 5], [2, 4], [1, 5], [1, 5]]
    assert [drawn(series(7), 2, number).tolist() for number in range(8)] == expected


def test_evaluation_compares_with_the_median_and_not_the_mean():
    # Median 5, mean 23.
    pixels = np.array([0, 4, 5, 6, 100], np.float32).reshape(5, 1, 1, 1)
    assert dates.nearest_to_median(pixels, None, 1, 0).tolist() == [2]


def test_evaluation_uses_every_band_of_the_mask():
    # The second band marks the first two dates; the median of the others is 60.
    pixels = np.array([50, 51, 60, 70, 10], np.float32).reshape(5, 1, 1, 1)
    mask = np.array([[0, 90], [0, 90], [0, 0], [0, 0], [0, 0]], np.uint8).reshape(5, 2, 1, 1)
    assert dates.nearest_to_median(pixels, None, 1, 0).tolist() == [1]
    assert dates.nearest_to_median(pixels, mask, 1, 0).tolist() == [2]


def test_where_every_date_has_a_gap_the_mean_difference_counts_and_not_the_sum():
    # Four pixels of three dates; their medians are 1.5, 1, 1 and 1. Differences of the first date: 1.5; of the second:
    # 1, 1, 0; of the third: 1.5, 1, 1. The means are 1.5, 2 / 3 and 7 / 6, the sums 1.5, 2 and 3.5.
    nan = np.nan
    pixels = np.array([[3, nan, nan, nan], [nan, 0, 0, 1], [0, 2, 2, nan]], np.float32)
    assert dates.nearest_to_median(pixels.reshape(3, 1, 1, 4), None, 1, 0).tolist() == [1]


def test_a_gap_between_two_dates_as_near_takes_the_earlier_one():
    pixels = series(3)
    pixels[1, 0, 0, 0] = np.nan
    filled, count = dates.fill_nan(pixels[[1]], np.array([1]), lambda: pixels)
    assert (count, filled[0, 0].tolist()) == (1, [[0.0, 1.0], [1.0, 1.0]])


def test_a_gap_in_the_whole_series_takes_the_mean_of_its_own_band():
    # Band 0 holds 1, 2, 3 at its other pixel, band 1 holds 10, 20, 30: means 2 and 20.
    pixels = np.array([[1, 10], [2, 20], [3, 30]], np.float32)[:, :, None, None].repeat(2, axis=3)
    pixels[:, :, 0, 0] = np.nan
    filled, count = dates.fill_nan(pixels[[2]], np.array([2]), lambda: pixels)
    assert (count, filled[0, :, 0].tolist()) == (1, [[2.0, 3.0], [20.0, 30.0]])


def images(*dates_: list[float]) -> np.ndarray:
    """(T, 1, 1, P) float32 from the pixels of each date."""
    return np.array(dates_, np.float32)[:, None, None, :]


NAN = np.nan


@pytest.mark.parametrize(
    ("pixels", "selected"),
    [
        # Medians 2 and 0 (the middle pixel has none); mean differences (1 + 7) / 2, (1 + 0) / 2 and 0.
        ([[3, NAN, 7], [1, NAN, 0], [NAN, NAN, 0]], 2),
        # Medians 5.5 and 5; 2.5, 3 and (2.5 + 3) / 2: the largest of the third is 3, over two pixels.
        ([[8, NAN, NAN], [NAN, NAN, 2], [3, NAN, 8]], 0),
        # Medians 3 and 5; (3 + 5) / 2, (3 + 0) / 2 and 2 of one pixel alone.
        ([[0, 0, NAN], [6, 5, NAN], [NAN, 7, NAN]], 1),
    ],
)
def test_where_all_dates_have_nan_the_mean_difference_of_their_finite_pixels_decides(pixels, selected):
    assert dates.nearest_to_median(images(*pixels), None, 1, 0).tolist() == [selected]


def test_a_date_with_nan_is_not_selected_where_another_has_none():
    # Medians 4 and 5. The second pixel of the first date equals the median, but its first is NaN.
    pixels = images([NAN, 5], [0, 4], [8, 9])
    assert dates.nearest_to_median(pixels, None, 1, 0).tolist() == [1]


def test_marks_are_ignored_where_every_date_has_one_marked_pixel():
    # The first pixel is marked on all dates. Medians of all values: 10 and 1; differences 11, 2 and 40.
    pixels = images([0, 0], [10, 3], [50, 1])
    mask = np.array([[90, 0]] * 3, np.uint8)[:, None, None, :]
    assert dates.nearest_to_median(pixels, mask, 1, 0).tolist() == [1]


def test_a_mark_of_any_band_excludes_its_own_pixel():
    # The upper right pixel is marked on the first two dates by the second band: its median is that of 9, 0 and 20.
    pixels = np.zeros((5, 1, 2, 2), np.float32)
    pixels[:, 0, 0, 1] = [100, 100, 9, 0, 20]
    mask = np.zeros((5, 2, 2, 2), np.uint8)
    mask[:2, 1, 0, 1] = 90
    assert dates.nearest_to_median(pixels, mask, 1, 0).tolist() == [2]


def test_a_drawn_date_with_nan_is_replaced_also_where_other_bins_have_none():
    pixels = series(6)
    pixels[0, 0, 0, 0] = NAN
    assert {drawn(pixels, 2, number)[0] for number in range(50)} == {1, 2}


def test_a_gap_takes_the_nearest_date_and_not_the_first():
    pixels = series(4)
    pixels[3, 0, 0, 0] = NAN
    filled, _ = dates.fill_nan(pixels[[3]], np.array([3]), lambda: pixels)
    assert filled[0, 0].tolist() == [[2.0, 3.0], [3.0, 3.0]]


def test_the_mean_of_a_band_with_one_finite_value_is_that_value():
    pixels = images([NAN, 6], [NAN, NAN])
    filled, _ = dates.fill_nan(pixels[[1]], np.array([1]), lambda: pixels)
    assert filled.reshape(-1).tolist() == [6.0, 6.0]


def test_medians_of_few_dates():
    assert dates._nan_median(images([0, 4, NAN], [10, NAN, NAN])[None])[0, 0, 0].tolist()[:2] == [5.0, 4.0]
    assert dates._nan_median(images([7])[None]).item() == 7.0
    assert np.isnan(dates._nan_median(images([NAN], [NAN])[None])).all()

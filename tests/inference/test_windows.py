"""Windows cover every pixel, and blending leaves what all windows agree on."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_scale.datasets.scenes.cells import CellRuns
from maestro_scale.datasets.scenes.grid import Cell
from maestro_scale.inference.blending import Blend, weights
from maestro_scale.inference.outputs import resized
from maestro_scale.inference.windows import BLOCK, Area, Box, chunk_side, starts, stride_m


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 40))
def test_windows_cover_an_axis(length, window, stride, offset):
    found = starts(length, window, min(stride, window), offset)
    covered = np.zeros(length, bool)
    for start in found:
        assert 0 <= start <= max(length - window, 0)
        covered[start : start + window] = True
    assert covered.all()


def test_strides_are_whole_pixels_of_sensors_and_map():
    assert stride_m(160, 0.5, [10, 10]) == 80
    assert stride_m(102.4, 0.5, [10.24, 0.2]) == 51.2
    assert stride_m(102.4, 0.3, [0.2, 0.8]) == 71.2
    assert stride_m(102.4, 0.75, [10.24, 0.2]) == 20.48  # 51.2 is their only common multiple in a window
    assert stride_m(51.2, 0.5, [10.24, 0.2]) == 20.48
    assert stride_m(160, 0.9, [60, 10]) == 60  # not less than a pixel
    assert stride_m(100, 0.5, [10, 3.3]) == 50  # they have no common multiple in a window


def test_overlapping_windows_begin_at_different_parts_of_a_token():
    # Tokens of 40 m: windows 60 m apart begin at its start or its middle, 80 m apart always at its start, 70 m apart at
    # 0 and 30, 30 m apart at 0, 10, 20 and 30.
    assert stride_m(160, 0.5, [10, 10], [40]) == 60
    assert stride_m(160, 0.75, [10, 10], [40]) == 30
    assert stride_m(160, 0.5, [10, 10], [20]) == 70
    assert stride_m(102.4, 0.5, [0.2, 0.2], [3.2]) == 49.6  # 15 1/2 tokens
    assert stride_m(102.4, 0.75, [0.2, 0.2], [3.2]) == 24.8  # 7 3/4 tokens
    assert stride_m(102.4, 0.5, [10.24, 0.2], [20.48, 3.2]) == 51.2  # no other multiple of both pixels
    assert stride_m(180, 0.5, [10, 10], [60]) == 90  # its start and its middle
    assert stride_m(160, 0.5, [10, 10], [80]) == 80  # two tokens in a window
    assert stride_m(160, 0.5, [10, 10], [160, 20]) == 70  # one, beside small ones
    assert stride_m(160, 0, [10, 10], [40]) == 160
    assert stride_m(160, 0.9, [10, 10], [40]) == 10


def test_sums_of_a_chunk_fit_into_memory():
    side = chunk_side(19, 512, 256 * 2**20)
    assert side % BLOCK == 0
    assert 4 * 20 * side**2 <= 256 * 2**20
    assert chunk_side(1, 512, 2**40) == 4096
    assert chunk_side(1, 16, 2**40) == 1024


def test_weights_of_half_overlapping_windows_add_up_to_one():
    w = weights(16)
    assert float(w.min()) > 0
    axis = w.sum(dim=0) / 8  # the sum of the other factor
    np.testing.assert_allclose(axis[:8] + axis[8:], 1, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 30), st.integers(4, 30), st.integers(3, 9), st.integers(1, 4), st.integers(0, 5))
def test_parts_of_a_map_equal_the_whole(height, width, side, stride, seed):
    stride = min(stride, side)  # a larger one leaves pixels out
    rng = np.random.default_rng(seed)
    tops, lefts = (np.array(starts(length, side, stride)) for length in (height, width))
    places = [(r, c) for r in tops.tolist() for c in lefts.tolist()]
    windows = CellRuns.rectangle(len(tops), len(lefts))
    area = Area("a", height, width, 1.0, windows, Cell(0, 0), tops, lefts, side)
    assert [area.corner(n) for n in range(len(places))] == places
    values = [torch.from_numpy(rng.normal(size=(2, side, side)).astype(np.float32)) for _ in places]

    def blended(box):
        blend = Blend(box, 2, side, torch.device("cpu"))
        for n in area.windows_of(box).tolist():
            blend.add(values[n], *area.corner(n))
        mean, covered = blend.finish()
        return mean.numpy(), covered.numpy()

    whole, covered = blended(Box(0, 0, height, width))
    assert covered.all()
    for box in area.chunks(5):
        assert area.count(box) == len(area.windows_of(box))
        part, _ = blended(box)
        rows_of, cols_of = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        np.testing.assert_array_equal(part, whole[:, rows_of, cols_of])


def test_equal_windows_stay_and_invalid_pixels_do_not_count():
    blend = Blend(Box(0, 0, 6, 8), 1, 4, torch.device("cpu"))
    invalid = np.zeros((4, 4), bool)
    invalid[:, :2] = True
    for row in (0, 2):
        for column in (0, 2, 4):
            blend.add(torch.full((1, 4, 4), 7.0), row, column, invalid)
    mean, covered = (found.numpy() for found in blend.finish())
    np.testing.assert_allclose(mean[0][covered], 7, rtol=1e-6)
    assert covered[:, 2:].all()
    assert not covered[:, :2].any()
    assert mean[0][~covered].tolist() == [0] * 12


def test_masks_at_the_pixels_of_a_map():
    mask = np.array([[True, False], [False, False]])
    assert resized(mask, 4).sum() == 4
    assert resized(resized(mask, 4), 2).tolist() == mask.tolist()
    assert resized(None, 4) is None

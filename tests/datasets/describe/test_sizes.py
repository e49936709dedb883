"""Proposed sizes: whole pixels and patches, and a sensible number of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale.datasets.describe.sizes import MAX_TOKENS, Input, Sizes, sizes_of_scenes, sizes_of_tiles

RESOLUTIONS = st.sampled_from([0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 3.0, 4.77, 5.0, 10.0, 20.0, 30.0, 60.0])
INPUTS = st.lists(st.builds(Input, RESOLUTIONS, st.integers(1, 80), st.just(5000)), min_size=1, max_size=3)


def check(sizes: Sizes) -> None:
    for r in sizes.rasters:
        side = sizes.crop_m / r.resolution_m
        assert side == pytest.approx(round(side))
        assert round(side) % r.patch == 0
        assert r.tokens == r.num_dates * (round(side) // r.patch) ** 2
        assert sizes.tile_m / r.resolution_m == pytest.approx(round(sizes.tile_m / r.resolution_m))


@given(INPUTS)
def test_tiles_of_scenes_are_whole_pixels_and_patches_of_all_rasters(inputs):
    check(sizes_of_scenes(inputs))


@pytest.mark.parametrize(
    "inputs", [[(10, 12)], [(0.2, 1), (10, 30)], [(3, 6)], [(30, 10)], [(0.05, 1), (10, 20)]]
)
def test_samples_have_a_sensible_number_of_tokens(inputs):
    sizes = sizes_of_scenes([Input(r, d, 5000) for r, d in inputs])
    assert 200 <= sizes.tokens <= MAX_TOKENS


@pytest.mark.parametrize(
    ("tile_m", "inputs", "crop_m"),
    [
        (60, [(0.2, 1), (10, 60)], 60),  # TreeSatAI-TS
        (102.4, [(0.2, 1), (10.24, 30)], 102.4),  # FLAIR-HUB
        (1280, [(10, 40), (1, 1)], 640),  # PASTIS-HD
        (127, [(1, 1)], 126),  # a prime number of pixels
    ],
)
def test_crops_of_tiles(tile_m, inputs, crop_m):
    sizes = sizes_of_tiles([Input(r, d, 0) for r, d in inputs], tile_m)
    check(sizes)
    assert sizes.crop_m == pytest.approx(crop_m)
    assert sizes.tokens <= MAX_TOKENS

"""Splits by blocks of ground: distance, the same on any machine, stable when tiles are added."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_scale.datasets.description.blocks import draw_blocks
from maestro_scale.datasets.spec import DatasetError

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}


def lattice(side: int, stride: float = 100.0, tile: float = 100.0, shift: float = 0.0) -> np.ndarray:
    cols, rows = (a.ravel().astype(float) for a in np.mgrid[:side, :side])
    west, south = cols * stride + shift, rows * stride + shift
    return np.stack([west, south, west + tile, south + tile], axis=1)


def gaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x = np.maximum(np.maximum(b[None, :, 0] - a[:, None, 2], a[:, None, 0] - b[None, :, 2]), 0)
    y = np.maximum(np.maximum(b[None, :, 1] - a[:, None, 3], a[:, None, 1] - b[None, :, 3]), 0)
    return np.hypot(x, y)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from([0.0, 50.0, 100.0, 130.0]),
    st.sampled_from([100.0, 60.0]),
    st.sampled_from([260.0, 400.0]),
)
def test_no_tile_is_near_a_tile_of_another_split(seed, distance_m, stride, size_m):
    bounds = lattice(28, stride)
    drawn = draw_blocks(bounds, size_m=size_m, fractions=FRACTIONS, distance_m=distance_m, seed=seed)
    parts = {name: bounds[[s == name for s in drawn.splits]] for name in FRACTIONS}
    assert sum(map(len, parts.values())) + sum(drawn.dropped.values()) == len(bounds)
    for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
        apart = gaps(parts[a], parts[b])
        assert apart.min() >= distance_m
        overlapping = (
            (parts[a][:, None, 0] < parts[b][None, :, 2])
            & (parts[b][None, :, 0] < parts[a][:, None, 2])
            & (parts[a][:, None, 1] < parts[b][None, :, 3])
            & (parts[b][None, :, 1] < parts[a][:, None, 3])
        )
        assert not overlapping.any()


def test_the_draw_is_the_same_on_any_machine():
    drawn = draw_blocks(lattice(40), size_m=500, fractions=FRACTIONS, distance_m=100, seed=3)
    digest = hashlib.sha256(",".join(s or "-" for s in drawn.splits).encode()).hexdigest()
    assert digest[:16] == "b2e510f9838cf4ce"
    assert draw_blocks(lattice(40), size_m=500, fractions=FRACTIONS, distance_m=100, seed=3) == drawn
    assert draw_blocks(lattice(40), size_m=500, fractions=FRACTIONS, distance_m=100, seed=4) != drawn


def test_the_fractions_are_kept_nearly():
    counts = np.zeros(3)
    for seed in range(10):
        drawn = draw_blocks(lattice(40), size_m=500, fractions=FRACTIONS, seed=seed)
        shares = np.array([drawn.splits.count(name) for name in FRACTIONS]) / 1600
        np.testing.assert_allclose(shares, list(FRACTIONS.values()), atol=0.07)
        counts += shares / 10
    np.testing.assert_allclose(counts, list(FRACTIONS.values()), atol=0.02)


def test_tiles_that_are_added_do_not_move_others():
    all_of = lattice(40)
    some = np.arange(len(all_of)) % 3 > 0
    drawn = draw_blocks(all_of, size_m=500, fractions=FRACTIONS)
    part = draw_blocks(all_of[some], size_m=500, fractions=FRACTIONS)
    assert part.splits == tuple(s for s, keep in zip(drawn.splits, some, strict=True) if keep)


def test_tiles_of_different_systems_are_compared_on_the_ground():
    from pyproj import Transformer

    # At the border of two UTM zones, 6° E: the same tiles in both.
    x, y = Transformer.from_crs(4326, 32631, always_xy=True).transform(6.0, 47.0)
    a = lattice(12) + [round(x, -2), round(y, -2)] * 2
    x, y = Transformer.from_crs(4326, 32632, always_xy=True).transform(6.0, 47.0)
    b = lattice(12) + [round(x, -2), round(y, -2)] * 2
    systems = ["EPSG:32631"] * len(a) + ["EPSG:32632"] * len(b)
    drawn = draw_blocks(
        np.concatenate([a, b]),
        size_m=300,
        fractions={"train": 0.5, "test": 0.5},
        distance_m=50,
        systems=systems,
    )
    to_first = Transformer.from_crs(32632, 32631, always_xy=True)
    centres = (b[:, :2] + b[:, 2:]) / 2
    moved = np.stack(to_first.transform(*centres.T), axis=1)
    first = (a[:, :2] + a[:, 2:]) / 2
    of_first, of_second = np.array(drawn.splits[: len(a)]), np.array(drawn.splits[len(a) :])
    apart = np.linalg.norm(first[of_first == "train"][:, None] - moved[of_second == "test"][None], axis=2)
    assert apart.min() > 150  # centres of tiles of 100 m that are 50 m apart


def test_a_block_may_be_as_large_as_a_tile_whose_corners_are_rounded():
    bounds = lattice(6, stride=294.4, tile=294.4, shift=500_000.0)
    assert float((bounds[:, 2:] - bounds[:, :2]).max()) > 294.4  # of large numbers
    drawn = draw_blocks(bounds, size_m=294.4, fractions=FRACTIONS, distance_m=0, seed=0)
    assert set(drawn.splits) == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": {"train": 0.7, "test": 0.2}}, "add up to 0.9, not to 1"),
        ({"size_m": 50}, "50 m is less than a tile of 100 m; use several tiles, for example 400"),
        ({"distance_m": 5000}, "split train gets no tile: all its .* tiles are nearer than 5000 m"),
        ({"size_m": 1e6}, "gets no tile: there are 1 blocks of 1e\\+06 m"),
    ],
)
def test_splits_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(DatasetError, match=message):
        draw_blocks(lattice(20), **{"size_m": 500, "fractions": FRACTIONS, **options})

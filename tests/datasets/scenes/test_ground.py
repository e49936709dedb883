"""Lengths of projections on the ground, and which systems tiles can be cut in."""

from __future__ import annotations

import numpy as np
import pytest

from maestro_scale.datasets.scenes.ground import check_metric, ground_m, is_metric_at, utm_crs
from maestro_scale.datasets.spec import DatasetError

TASMANIA = np.array([[147.3, -42.9]])


@pytest.mark.parametrize(
    ("crs", "message"),
    [("EPSG:4326", "in degree"), ("EPSG:2263", "in US survey foot"), ("EPSG:4978", "in metre")],
)
def test_tiles_are_cut_in_metres(crs, message):
    with pytest.raises(DatasetError, match=f"{message}.*EPSG:32755 \\(the UTM zone"):
        check_metric(crs, TASMANIA)
    assert utm_crs(180.0, 1.0) == "EPSG:32601"


def test_a_metre_of_web_mercator_is_half_a_metre_at_60_degrees():
    y = 8_399_737.89  # of 60° N
    # cos(60°) · a / N to the east and · a / M to the north, with N and M the radii of curvature of WGS84
    np.testing.assert_allclose(ground_m("EPSG:3857", 1e6, y), [[1 / 1.994972, 1 / 1.998321]], rtol=1e-4)
    np.testing.assert_allclose(ground_m("EPSG:3857", 1e6, 0.0), [[1, 1 - 0.00669438]], rtol=1e-4)
    assert not is_metric_at("EPSG:3857", 1e6, y)
    assert is_metric_at("EPSG:32631", 500_000, 6e6)


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:3395", "EPSG:6933", "EPSG:32631"])
def test_systems_that_are_not_true_to_scale_are_refused(crs):
    with pytest.raises(
        DatasetError, match=r"1000 m in it are \d+ m to the east .* EPSG:32755 .*warped"
    ) as error:
        check_metric(crs, np.array([[3.0, 1.0], [np.inf, 0.0], *TASMANIA]))  # only one of the scenes is far
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("crs", "place"),
    [
        ("EPSG:3857", (10.0, 5.0)),
        ("EPSG:3035", (-9.0, 38.0)),  # Europe, in Lisbon
        ("EPSG:5070", (-80.0, 26.0)),  # United States, in Florida
        ("EPSG:3031", (160.0, -78.0)),
        ("EPSG:2154", (7.5, 48.5)),
        ("EPSG:32631", (8.0, 50.0)),  # a neighbouring zone
    ],
)
def test_systems_for_a_country_or_a_continent_are_true_to_scale(crs, place):
    check_metric(crs, np.array([place]))

"""Scenes: consistent between sensors, with the class in the time series."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from maestro_scale.datasets.synthetic import scene as scenes
from maestro_scale.datasets.synthetic.scene import Scene

BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
DAYS = np.arange(3, 365, 7)


def series(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance (T, C) averaged over the tile, and whether a date is clear (T,)."""
    snow, cloud = scene.weather(DAYS, 10.0)
    clear = (np.maximum(snow, cloud) == 0).all(axis=(1, 2))
    return scene.optical(DAYS, BANDS, 10.0, snow, cloud).mean(axis=(2, 3)), clear


def test_a_scene_does_not_depend_on_the_order_of_the_calls():
    a, b = Scene(5, 9, 60.0, 15), Scene(5, 9, 60.0, 15)
    photo, radar = a.photo(170, ("NIR", "R"), 1.0), a.radar(DAYS, "asc", 10.0)
    np.testing.assert_array_equal(radar, b.radar(DAYS, "asc", 10.0))
    np.testing.assert_array_equal(photo, b.photo(170, ("NIR", "R"), 1.0))
    assert not np.array_equal(radar, Scene(5, 10, 60.0, 15).radar(DAYS, "asc", 10.0))


@pytest.mark.parametrize(
    ("extent_m", "coarse_m", "fine_m"), [(60.0, 10.0, 0.2), (102.4, 10.24, 0.2), (640.0, 10.0, 1.25)]
)
def test_sensors_of_any_resolution_have_the_same_map(extent_m, coarse_m, fine_m):
    scene = Scene(1, 2, extent_m, 19)
    fractions = scene.fractions(coarse_m)
    assert fractions.shape == (19, round(extent_m / coarse_m), round(extent_m / coarse_m))
    np.testing.assert_allclose(fractions.sum(axis=0), 1, atol=1e-5)
    fine = np.bincount(scene.cover(fine_m).ravel(), minlength=19) / round(extent_m / fine_m) ** 2
    np.testing.assert_allclose(fractions.mean(axis=(1, 2)), fine, atol=0.02)
    np.testing.assert_allclose(scene.shares(), fine, atol=0.03)


def test_a_margin_widens_the_image_without_moving_it():
    scene = Scene(0, 4, 60.0, 15)
    np.testing.assert_array_equal(scene.cover(0.2, 0.4)[2:-2, 2:-2], scene.cover(0.2))


def test_phenologies_differ_in_timing_only():
    curves = scenes.phenology(np.linspace(0, scenes.DAYS, 1001)[:-1])
    for moment in (1, 2, 3):
        np.testing.assert_allclose((curves**moment).mean(axis=1), (curves[0] ** moment).mean(), rtol=1e-6)
    assert len(set(curves.argmax(axis=1))) == len(curves)


def test_more_classes_than_signatures_are_refused():
    with pytest.raises(ValueError, match="1 to 20 classes"):
        Scene(0, 0, 60.0, 21)


def test_series_separate_classes_that_channel_means_do_not():
    """Knowing the signatures, the dominant class is read off the series; channel means hardly tell it."""
    tiles = [Scene(0, i, 60.0, 15) for i in range(300)]
    truth = np.array([t.shares().argmax() for t in tiles])
    seen = [series(t) for t in tiles]
    oracle = np.array([signature_match(*s) for s in seen])
    means = np.stack([values[clear].mean(axis=0) for values, clear in seen])
    means = (means - means.mean(axis=0)) / means.std(axis=0)
    fitted = LogisticRegression(C=10, max_iter=500).fit(means[:200], truth[:200])
    by_means = (fitted.predict(means[200:]) == truth[200:]).mean()
    by_series = (oracle[200:] == truth[200:]).mean()
    assert by_series > 0.6
    assert by_means < by_series - 0.25


def signature_match(values: np.ndarray, clear: np.ndarray) -> int:
    """The class whose spectra through the year are nearest in shape, whatever light, haze and soil may do."""
    nm = np.array([scenes.BAND_NM[b] for b in BANDS])
    leaves = np.stack([np.interp(nm, scenes._NM, leaf) for leaf in scenes._LEAVES[:3]])
    soil = np.interp(nm, scenes._NM, scenes._SOIL)
    green = 0.92 * scenes.phenology(DAYS[clear])[None, :, :, None]
    # What gain and tilt (a line over the logarithm of wavelength) cannot make is the shape.
    line = np.stack([np.ones(len(nm)), np.log(nm)])
    shape = np.eye(len(nm)) - np.linalg.pinv(line) @ line
    seen = np.log(values[clear]) @ shape
    misfits = []
    for brightness in (0.6, 1.0, 1.4):
        pure = green * leaves[:, None, None] + (1 - green) * soil * brightness
        misfits.append(np.abs(np.log(pure) @ shape - seen).mean(axis=(2, 3)))
    return int(np.min(misfits, axis=0).argmin())

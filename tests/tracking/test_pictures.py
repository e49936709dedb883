"""Reconstruction pictures show the input, the mask and the reconstruction, in comparable colours."""

import dataclasses
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from maestro_scale.tracking.pictures import (
    choose_composite,
    pca_colours,
    reconstruction_picture,
    select_dates,
    stretch_limits,
)
from maestro_scale.training.observer import SensorView

S2 = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")


def view(name="s2", bands=S2, num_dates=6, size=6, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(num_dates, len(bands), size, size)).astype(np.float32)
    hidden = np.zeros((num_dates, size, size), bool)
    hidden[:, :, : size // 2] = True
    embedding = rng.normal(size=(3, 3, 8)).astype(np.float32)
    return SensorView(name, bands, pixels, hidden, pixels + 0.3, embedding)


@pytest.mark.parametrize(
    ("bands", "shown"),
    [
        (("R", "G", "B"), "R G B"),
        (("NIR", "R", "G", "B"), "R G B"),
        (("NIR", "R", "G"), "NIR R G"),
        (S2, "B4 B3 B2"),
        (("VV", "VH"), "VV VH VV/VH"),
        (("VV", "VH", "ratio"), "VV VH VV/VH"),
        (("DSM", "DTM"), "DSM"),
        (("a", "b", "c", "d"), "a b c"),
        (("pan",), "pan"),
    ],
)
def test_colours_follow_from_band_names(bands, shown):
    composite = choose_composite(bands)
    assert composite.label == shown
    assert composite.apply(np.zeros((2, len(bands), 4, 4), np.float32)).shape == (2, 4, 4, 3)


def test_radar_shows_the_ratio_as_a_difference_of_logarithms():
    pixels = np.stack([np.full((3, 3), 2.0), np.full((3, 3), 0.5)])[None]
    assert choose_composite(("VV", "VH")).apply(pixels)[0, 0, 0].tolist() == [2.0, 0.5, 1.5]


@pytest.mark.parametrize(
    ("num", "shown"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (16, [0, 5, 10, 15])]
)
def test_a_few_dates_are_shown(num, shown):
    assert select_dates(num).tolist() == shown


def test_a_cloudy_date_does_not_darken_the_others():
    rng = np.random.default_rng(0)
    clear = rng.uniform(0.02, 0.06, (7, 6, 6, 3))
    _, high = stretch_limits(np.concatenate([clear, np.full((1, 6, 6, 3), 0.9)]))
    assert (high < 0.15).all()
    low, high = stretch_limits(clear)
    np.testing.assert_allclose([low.mean(), high.mean()], [0.02, 0.06], atol=0.003)
    low, high = stretch_limits(np.full((1, 2, 2, 3), np.nan))
    assert (low < high).all()


def test_a_picture_of_every_sensor(tmp_path):
    aerial, radar = view("aerial", ("NIR", "R", "G", "B"), 1, 40), view("s1_asc", ("VV", "VH"), 2)
    radar.pixels[0] = np.nan
    before = set(sys.modules)
    path = reconstruction_picture(
        tmp_path / "pictures" / "step_00000100.png", [aerial, view(), radar], "run, step 100"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    with pytest.raises(ValueError, match="at least one"):
        reconstruction_picture(path, [], "nothing")


def test_only_masked_pixels_show_the_reconstruction(tmp_path):
    whole = view()
    wild = np.where(whole.hidden[:, None], whole.reconstruction, 99.0).astype(np.float32)
    pasted = dataclasses.replace(whole, reconstruction=wild)
    other = dataclasses.replace(whole, reconstruction=whole.pixels)
    first, same, different = (
        reconstruction_picture(tmp_path / f"{i}.png", [v], "t").read_bytes()
        for i, v in enumerate((whole, pasted, other))
    )
    assert first == same
    assert first != different


def test_the_reconstruction_has_the_inputs_stretch(tmp_path):
    """A reconstruction that is too bright is white: with its own stretch it would look like the input."""
    bright = view()
    pictures = [
        reconstruction_picture(
            tmp_path / "a.png", [dataclasses.replace(bright, reconstruction=made)], "t"
        ).read_bytes()
        for made in (bright.pixels + 50, bright.pixels * 2 + 80)
    ]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(("error", "colour"), [(0.0, 0.0), (0.125, 0.25), (0.25, 0.5), (0.75, 1.0)])
def test_the_error_is_coloured_as_a_fraction_of_the_inputs_range(tmp_path, error, colour):
    """An error of half the range or more has the last colour of the scale."""
    pixels = (
        np.random.default_rng(0).integers(0, 2, (1, 3, 40, 40)).astype(np.float32)
    )  # stretched from 0 to 1
    towards = np.where(pixels == 1, -error, error).astype(np.float32)
    whole = np.ones((1, 40, 40), bool)
    made = SensorView("aerial", ("R", "G", "B"), pixels, whole, pixels + towards, np.zeros((3, 3, 8)))
    image = imread(reconstruction_picture(tmp_path / "a.png", [made], "t"))[..., :3]
    panel = image[:, int(0.61 * image.shape[1]) : int(0.78 * image.shape[1])]  # the fourth of five columns
    expected = colormaps["magma"](colour)[:3]
    assert np.isclose(panel, expected, atol=0.02).all(-1).mean() > 0.4


def test_the_embedding_shows_its_principal_components():
    north, east = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5), indexing="ij")
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    embedding = 7.0 + 3 * north[..., None] * axes[0] + east[..., None] * axes[1]
    colours = pca_colours(embedding)
    for channel, ramp in zip((0, 1), (north, east), strict=True):
        slopes = np.polynomial.polynomial.polyfit(ramp.ravel(), colours[..., channel].ravel(), 1)[1]
        assert abs(slopes) > 0.4, "each component has the full range, however small its variance"
    assert (colours[..., 2] == 0.5).all(), "there is no third component"
    np.testing.assert_allclose(pca_colours(embedding * 2 + 1), colours, atol=1e-6)
    assert (pca_colours(np.ones((4, 4, 2))) == 0.5).all()

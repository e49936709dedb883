"""Scenes: consistent between sensors, with correlated noise, and classes that are separable as their table says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from maestro_scale.datasets.synthetic import photo, radar, vegetation
from maestro_scale.datasets.synthetic.classes import (
    COARSE,
    CONIFER,
    EVERGREEN,
    FINE,
    VARIANTS,
    Variant,
    variants_of,
)
from maestro_scale.datasets.synthetic.fields import Fields, Grid, fractal
from maestro_scale.datasets.synthetic.scene import Scene
from maestro_scale.datasets.synthetic.vegetation import BAND_NM, NUISANCE, Nuisance

BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
NM = np.array([BAND_NM[b] for b in BANDS], float)
DAYS = np.arange(3, 365, 7)
MIDDLE = Nuisance(**{name: (low + high) / 2 for name, (low, high) in NUISANCE.items()})


def of_class(label: int) -> list[Variant]:
    return [v for v in VARIANTS if v.label == label]


# ---- one ground for all sensors


def test_a_scene_does_not_depend_on_the_order_of_the_calls():
    a, b = Scene(5, 9, 60.0, 15), Scene(5, 9, 60.0, 15)
    image, power = a.photo(170, ("NIR", "R"), 1.0), a.radar(DAYS, "asc", 10.0)
    np.testing.assert_array_equal(power, b.radar(DAYS, "asc", 10.0))
    np.testing.assert_array_equal(image, b.photo(170, ("NIR", "R"), 1.0))
    assert not np.array_equal(power, Scene(5, 10, 60.0, 15).radar(DAYS, "asc", 10.0))
    assert not np.array_equal(power, Scene(6, 9, 60.0, 15).radar(DAYS, "asc", 10.0))


@pytest.mark.parametrize("num_parcels", [0, 12])
@pytest.mark.parametrize(
    ("extent_m", "coarse_m", "fine_m"), [(60.0, 10.0, 0.2), (102.4, 10.24, 0.2), (640.0, 10.0, 1.25)]
)
def test_sensors_of_any_resolution_have_the_same_map(extent_m, coarse_m, fine_m, num_parcels):
    scene = Scene(1, 2, extent_m, 19, num_parcels)
    fractions = scene.fractions(coarse_m)
    assert fractions.shape == (19, round(extent_m / coarse_m), round(extent_m / coarse_m))
    np.testing.assert_allclose(fractions.sum(axis=0), 1, atol=1e-5)
    fine = np.bincount(scene.cover(fine_m).ravel(), minlength=19) / round(extent_m / fine_m) ** 2
    np.testing.assert_allclose(fractions.mean(axis=(1, 2)), fine, atol=0.02)
    np.testing.assert_allclose(scene.shares(), fine, atol=0.03)


def test_a_margin_widens_the_image_without_moving_it():
    scene = Scene(0, 4, 60.0, 15)
    np.testing.assert_array_equal(scene.cover(0.2, 0.4)[2:-2, 2:-2], scene.cover(0.2))


def test_a_coarse_pixel_is_the_mean_of_the_fine_ones():
    scene = Scene(2, 0, 60.0, 15)
    coarse, fine = scene.relief(10.0), scene.relief(0.5)
    np.testing.assert_allclose(fine.reshape(6, 20, 6, 20).mean(axis=(1, 3)), coarse, atol=1e-5)
    # The order in which sensors ask does not change a field, although a coarse one does not draw the fine octaves.
    spacings = (40.0, 10.0, 2.5, 0.625)
    fields = [
        Fields(np.random.default_rng(1), 60.0, spacings, fractal(spacings, 0.3)[None].repeat(2, 0))
        for _ in "ab"
    ]
    small, large = Grid(60.0, 0.5), Grid(60.0, 10.0)
    first, second = fields[0].sample(large), fields[0].sample(small)
    np.testing.assert_array_equal(second, fields[1].sample(small))
    np.testing.assert_array_equal(first, fields[1].sample(large))
    assert np.corrcoef(second.reshape(2, -1))[0, 1] < 0.7, "fields of a scene are independent of each other"


def test_a_field_has_the_variance_that_it_states_and_is_correlated_over_its_spacing():
    values = np.stack([
        Fields(np.random.default_rng(i), 60.0, (20.0,), np.array([[3.0]])).sample(Grid(60.0, 1.0))[0]
        for i in range(300)
    ])  # fmt: skip
    assert values.std() == pytest.approx(3.0, rel=0.03)
    # Cubic splines at 0, 1 and 2 lattice spacings: 2416, 1191 and 120 of 5040, averaged over both pixels' positions.
    for lag, correlation in ((20, 1191 / 2416), (40, 120 / 2416)):
        pairs = (values[:, :, lag:] * values[:, :, :-lag]).mean() / values.var()
        assert pairs == pytest.approx(correlation, abs=0.06)


def test_optical_sensors_see_the_same_ground_on_one_day():
    scene, days = Scene(4, 3, 640.0, 15, 12), np.array([170])
    clear = np.zeros((1, 64, 64), np.float32)
    a = np.log(scene.optical(days, BANDS, 10.0, clear, clear)[0, 6])
    b = np.log(scene.optical(days, ("L4", "L5"), 10.0, clear, clear)[0, 1])
    photo_nir = scene.photo(170, ("NIR",), 1.25)[0].reshape(64, 8, 64, 8).mean(axis=(1, 3))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.7
    assert np.corrcoef(a.ravel(), photo_nir.ravel())[0, 1] > 0.5
    other = np.log(Scene(4, 4, 640.0, 15, 12).optical(days, BANDS, 10.0, clear, clear)[0, 6])
    assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 0.3


# ---- the map


def test_fields_have_as_many_parcels_as_asked_and_a_sixth_as_many_classes():
    scene = Scene(3, 1, 1280.0, 19, 36)
    assert len(scene.landscape.classes) == 36
    assert len(set(scene.landscape.classes.tolist())) == 6
    shares = scene.landscape.parcel_shares(Grid(1280.0, 10.0))
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
    assert (shares.mean(axis=(1, 2)) < 0.3).all()


def test_a_class_has_one_of_its_variants_in_a_tile():
    drawn = {9: set(), 12: set(), 3: set()}
    for index in range(40):
        variants = Scene(0, index, 60.0, 15).variants
        assert [v.label for v in variants] == list(range(15))
        for label, found in drawn.items():
            found.add(variants[label])
    assert {label: len(found) for label, found in drawn.items()} == {9: 2, 12: 2, 3: 1}


def test_more_classes_than_signatures_are_refused():
    with pytest.raises(ValueError, match="1 to 20 classes"):
        Scene(0, 0, 60.0, 21)


# ---- seasons


def test_phenologies_differ_in_timing_only():
    curves = vegetation.phenology(np.linspace(0, vegetation.DAYS, 1001)[:-1])[: vegetation.NUM_SHIFTED]
    for moment in (1, 2, 3):
        np.testing.assert_allclose((curves**moment).mean(axis=1), (curves[0] ** moment).mean(), rtol=1e-6)
    assert len(set(curves.argmax(axis=1))) == len(curves)


def test_the_seasons_of_pairs_are_equal_in_mid_june():
    green = vegetation.phenology(np.array([165]))[:, 0]
    assert green[0] == pytest.approx(green[4])
    assert green[1] == pytest.approx(green[3])
    assert green[2] == pytest.approx(1.0)


def test_the_ground_is_never_bare_and_has_a_season_of_its_own():
    # 0.67 + 0.33 · exp(κ (cos(180°) − 1)) with κ = (365.25 / (2π · 75))² = 0.6007, half a year after day 150
    assert vegetation.ground_season(np.array([150.0]))[0] == pytest.approx(1.0)
    assert vegetation.ground_season(np.array([150 + 365.25 / 2]))[0] == pytest.approx(
        0.67 + 0.33 * 0.3007, abs=1e-4
    )


def test_evergreen_trees_stay_green_through_the_winter():
    def ndvi(label: int) -> np.ndarray:
        pure = vegetation.signatures(MIDDLE, DAYS, np.array([665.0, 842.0]), of_class(label)[:1])[0, 0]
        return (pure[:, 1] - pure[:, 0]) / (pure[:, 1] + pure[:, 0])

    pine, broadleaf = ndvi(13), ndvi(1)
    assert pine.min() > 0.55
    assert np.ptp(pine) < 0.15
    assert np.ptp(broadleaf) > 3 * np.ptp(pine)
    assert [v.family for v in of_class(13)] == [CONIFER]
    assert [v.season for v in of_class(13)] == [EVERGREEN]


# ---- radar


def test_speckle_has_the_looks_and_the_correlation_of_the_impulse_response():
    factors = radar.speckle(np.random.default_rng(0), (60, 2, 64, 64))
    assert factors.mean() == pytest.approx(1.0, abs=0.005)
    assert factors.var() == pytest.approx(1 / 4.4, rel=0.02)
    noise = factors - factors.mean()
    # Response 0.14, 0.72, 0.14: 2 · 0.14 · 0.72 and 0.14² over 0.72² + 2 · 0.14² = 0.5576
    for lag, correlation in ((1, 0.3615), (2, 0.0352), (3, 0.0)):
        for a, b in ((noise[..., lag:], noise[..., :-lag]), (noise[..., lag:, :], noise[..., :-lag, :])):
            assert (a * b).mean() / noise.var() == pytest.approx(correlation, abs=0.01)
    assert abs((noise[1:] * noise[:-1]).mean()) / noise.var() < 0.01, "independent from date to date"


def test_the_pattern_of_radar_images_persists_between_dates_and_partly_between_orbits():
    scene = Scene(1, 1, 200.0, 1)  # one class: what is left is the pattern

    def pattern(orbit: str, days: np.ndarray) -> np.ndarray:
        return 10 * np.log10(scene.radar(days, orbit, 10.0)).mean(axis=0)

    early, late = pattern("asc", np.arange(0, 180, 2)), pattern("asc", np.arange(180, 360, 2))
    other, vh = pattern("des", np.arange(0, 180, 2)), early[1]
    assert np.corrcoef(early[0].ravel(), late[0].ravel())[0, 1] > 0.95
    assert 0.2 < np.corrcoef(early[0].ravel(), other[0].ravel())[0, 1] < 0.8
    assert 0.2 < np.corrcoef(early[0].ravel(), vh.ravel())[0, 1] < 0.8


# ---- separability by design


def optical(variant: Variant) -> np.ndarray:
    return vegetation.signatures(MIDDLE, DAYS, NM, [variant])[0, 0]


def backscatter(variant: Variant) -> np.ndarray:
    return radar.backscatter_db(MIDDLE, DAYS, "asc", [variant])[0, 0]


def test_no_two_classes_have_a_variant_in_common():
    for a, b in itertools.combinations(VARIANTS, 2):
        if a.label != b.label:
            assert (a.family, a.season, a.texture, a.structure) != (
                b.family,
                b.season,
                b.texture,
                b.structure,
            )
    assert len(variants_of(20)) == 24


def test_some_classes_differ_in_season_only():
    first = of_class(0)[0]
    for label in (1, 2, 3, 4, 15):
        (variant,) = of_class(label)
        assert (variant.family, variant.texture, variant.structure) == (
            first.family,
            first.texture,
            first.structure,
        )
        assert np.abs(np.log(optical(variant) / optical(first))).max() > 0.5


def test_some_classes_differ_in_texture_only():
    (fine,), (coarse,) = of_class(5), of_class(6)
    np.testing.assert_array_equal(optical(fine), optical(coarse))
    np.testing.assert_array_equal(backscatter(fine), backscatter(coarse))
    assert (fine.texture, coarse.texture) == (FINE, COARSE)


def test_some_classes_differ_in_radar_only():
    (opened,), (dense,) = of_class(7), of_class(8)
    np.testing.assert_array_equal(optical(opened), optical(dense))
    assert opened.texture == dense.texture
    # Dense: VV 0.6 dB lower, VH 1.6 dB higher, on every date.
    np.testing.assert_allclose(backscatter(dense) - backscatter(opened), [[-0.6, 1.6]] * len(DAYS), atol=1e-9)


@pytest.mark.parametrize(("a", "b", "other"), [(9, 10, "structure"), (11, 12, "texture")])
def test_some_pairs_differ_in_two_properties_together_and_in_neither_alone(a, b, other):
    for name in ("season", other):
        assert sorted(getattr(v, name) for v in of_class(a)) == sorted(getattr(v, name) for v in of_class(b))
    joint = [{(v.season, getattr(v, other)) for v in of_class(k)} for k in (a, b)]
    assert not joint[0] & joint[1]
    # The other sensor contains no trace of the season: radar by design, images in June as the seasons are symmetric.
    first, second = of_class(a)
    early, late = (Variant(a, v.family, v.season) for v in (first, second))
    np.testing.assert_array_equal(backscatter(early), backscatter(late))
    june = vegetation.signatures(MIDDLE, np.array([165]), NM, [early, late])[0, :, 0]
    np.testing.assert_allclose(june[0], june[1])


@pytest.mark.parametrize("texture", [FINE, COARSE])
@pytest.mark.parametrize("rows", [False, True])
def test_rows_and_crowns_have_the_period_of_the_class(texture, rows):
    scene, grid = Scene(0, 0, 120.0, 15), Grid(120.0, 0.5)
    parcels = np.zeros((240, 240), np.uint8)
    light = photo.texture(scene.rng, grid, parcels, [Variant(0, 0, 0, texture)], rows)
    power = np.abs(np.fft.rfft2(light - light.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(240, 0.5)[:, None], np.fft.rfftfreq(240, 0.5))
    period = photo.PERIOD_M[texture]
    near = np.abs(frequency * period - 1) < 0.12  # stretched by at most 8 % in a tile
    peak = frequency.ravel()[power.argmax()]
    assert 1 / peak == pytest.approx(period, rel=0.12)
    assert power[near].mean() > 5 * power[(frequency > 0.05) & ~near].mean()


def test_series_separate_classes_that_channel_means_do_not():
    """Knowing the signatures, the season of the dominant class is read off the series, not off channel means."""
    tiles = [Scene(0, i, 60.0, 5) for i in range(240)]
    truth = np.array([t.shares().argmax() for t in tiles])
    clear = np.zeros((len(DAYS), 6, 6), np.float32)
    values = np.stack([t.optical(DAYS, BANDS, 10.0, clear, clear).mean(axis=(2, 3)) for t in tiles])
    ratio = np.log(values[:, :, 6] / values[:, :, 2])  # near infrared to red, without the light of a date
    pure = vegetation.signatures(MIDDLE, DAYS, NM, variants_of(5))[0]
    expected = np.log(pure[:, :, 6] / pure[:, :, 2])
    ratio, expected = (x - x.mean(axis=1, keepdims=True) for x in (ratio, expected))
    by_series = ((ratio @ expected.T).argmax(axis=1) == truth)[160:].mean()
    means = values.mean(axis=1)
    means = (means - means.mean(axis=0)) / means.std(axis=0)
    fitted = LogisticRegression(C=10, max_iter=500).fit(means[:160], truth[:160])
    by_means = (fitted.predict(means[160:]) == truth[160:]).mean()
    assert by_series > 0.75
    assert by_means < by_series - 0.25

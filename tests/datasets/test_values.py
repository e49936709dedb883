"""Checks of stored values, and fills of invalid pixels, against values computed by hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale import datasets
from maestro_scale.datasets.fill import QUANTITIES, clean_image, clean_series, invalid_values, percent
from maestro_scale.datasets.quantity import QUANTITY_KINDS
from maestro_scale.datasets.spec import DatasetError, Modality
from maestro_scale.datasets.values import (
    LARGEST,
    InvalidNote,
    array_problem,
    chronological,
    dates_problem,
    extremes,
    is_zero,
    mask_problem,
    masked_problem,
    shares_problem,
)

DATES = np.array([[2020, 10, 0], [2020, 20, 0], [2020, 30, 0]], np.int16)


def modality(dtype: str, *, bands: tuple[str, ...] = ("VV",), mask: tuple[str, ...] = ()) -> Modality:
    return Modality("m", bands, 10.0, 2, dtype, series=True, mask_bands=mask)


def column(*values: float, dtype: str = "float32") -> np.ndarray:
    """(T, 1, 1, 2): each value beside a valid one, 0.5 or 5 in integers."""
    valid = 0.5 if np.dtype(dtype).kind == "f" else 5
    return np.array([[[[v, valid]]] for v in values], dtype)


@pytest.mark.parametrize(
    ("dataset", "name", "value", "valid"),
    [
        ("treesatai_ts", "s1_asc", np.inf, False),
        ("treesatai_ts", "s1_des", 0.0, False),
        ("treesatai_ts", "s1_asc", -9999.0, False),
        ("treesatai_ts", "s1_asc", 1e-12, True),
        ("treesatai_ts", "s1_asc", 1e4, True),
        ("flair_hub", "s1_asc", 3.4028235e38, False),
        ("pastis_hd", "s1_asc", -9999.0, False),
        ("pastis_hd", "s1_des", -np.inf, False),
        ("pastis_hd", "s1_des", -60.0, True),
        ("s2_naip", "s1", 0.0, False),
        ("s2_naip", "s1", -32768.0, False),
        ("s2_naip", "s1", 30.0, True),
    ],
)
def test_invalid_radar_values_become_nan_and_valid_ones_stay(dataset, name, value, valid):
    notes: list[str] = []
    given = column(value, 0.25)
    out = clean_series(given, DATES[:2], modality("float32"), QUANTITIES[dataset][name], "f", notes)
    expected = given.copy()
    if not valid:
        expected[0, 0, 0, 0] = np.nan
    np.testing.assert_array_equal(out.values, expected)
    assert (len(notes), out.values.dtype) == (0 if valid else 1, np.float32)


@pytest.mark.parametrize(
    ("value", "stored"), [(-10_000, 0), (-9999, 0), (-9998, -9998), (-4758, -4758), (22_626, 22_626)]
)
def test_fill_values_of_reflectance_become_0(value, stored):
    """-10000 is MAJA's nodata; the other reflectances are the extremes that were found in PASTIS."""
    notes: list[str] = []
    series = clean_series(
        column(value, 7, dtype="int16"),
        DATES[:2],
        modality("int16", bands=("B2",)),
        QUANTITIES["pastis_hd"]["s2"],
        "f",
        notes,
    )
    assert series.values[0, 0, 0].tolist() == [stored, 5]
    expected = ["m has fill values (-9999 or lower, or from 1e20): stored as 0"] if value <= -9999 else []
    assert notes == expected


def test_each_kind_of_invalid_value_has_one_note():
    values = np.full((3, 1, 2, 2), 0.5, np.float32)
    values[0, 0, 0] = np.nan, np.inf
    values[1, 0, 0] = 0, -3
    values[2, 0, 0, 0] = 7
    values[2, 0, 1, 1] = 1e6  # the highest valid value
    declared = values == 7
    declared[0, 0, 0, 0] = True  # also NaN: counted as declared
    notes: list[str] = []
    out = clean_series(
        values,
        DATES,
        modality("float32"),
        QUANTITIES["flair_hub"]["s1_asc"],
        "f",
        notes,
        declared=declared,
    )
    assert np.isnan(out.values[:, 0, 0]).tolist() == [[True, True], [True, True], [True, False]]
    assert np.isnan(out.values).sum() == 5
    assert out.values[2, 0, 1].tolist() == [0.5, 1e6]
    assert notes == [
        "m has values that the file declares as nodata: stored as NaN",
        "m has infinite values: stored as NaN",
        "m has zeros, which in linear power are no measurement: stored as NaN",
        "m has fill values (negative or above 1e6): stored as NaN",
    ]


def test_invalid_pixels_are_marked_where_there_is_a_cloud_mask():
    """The date without any valid value stays: marked dates are selected last."""
    values = np.full((2, 2, 1, 2), 300, np.float64)
    values[0] = -9999
    values[1, 1, 0, 0] = np.nan
    notes: list[str] = []
    s2 = modality("int16", bands=("B2", "B3"), mask=("snow", "cloud"))
    mask = np.zeros((2, 2, 1, 2), np.uint8)
    out = clean_series(values, DATES[:2], s2, QUANTITIES["flair_hub"]["s2"], "f", notes, mask=mask)
    assert out.values[0].tolist() == [[[0, 0]], [[0, 0]]]
    assert out.values[1].tolist() == [[[300, 300]], [[0, 300]]]
    assert out.mask is not None
    assert out.mask[:, 0].tolist() == [[[0, 0]], [[0, 0]]]  # snow
    assert out.mask[:, 1].tolist() == [[[100, 100]], [[100, 0]]]
    assert not mask.any()  # the file's own array is not changed
    assert notes == [
        "m has NaN: stored as 0 and marked as cloud",
        "m has fill values (-9999 or lower, or from 1e20): stored as 0 and marked as cloud",
    ]


def test_dates_without_any_valid_value_are_removed_where_nothing_marks_them():
    values = np.stack([np.full((1, 1, 2), v, np.int16) for v in (100, -10_000, 200)])
    notes: list[str] = []
    s2 = modality("int16", bands=("B2",))
    out = clean_series(values, DATES, s2, QUANTITIES["pastis_hd"]["s2"], "f", notes)
    assert out.values[:, 0, 0, 0].tolist() == [100, 200]
    assert out.dates[:, 1].tolist() == [10, 30]
    assert notes[1:] == ["m has dates without any valid value: these dates are left out"]


def test_dates_of_nan_stay_because_the_selection_of_dates_recognises_them():
    values = np.stack([np.full((1, 1, 2), v, np.float32) for v in (-12, 0, -13)])
    notes: list[str] = []
    out = clean_series(values, DATES, modality("float32"), QUANTITIES["s2_naip"]["s1"], "f", notes)
    assert out.dates.tolist() == DATES.tolist()
    assert np.isnan(out.values[1]).all()
    assert len(notes) == 1


@pytest.mark.parametrize("name", ["s2", "s1_asc"])
def test_a_series_without_any_valid_value_is_an_error(name):
    values = np.full((2, 1, 2, 2), -10_000, np.float32)
    with pytest.raises(DatasetError, match="f: no pixel of any date has a valid value") as error:
        clean_series(values, DATES[:2], modality("float32"), QUANTITIES["pastis_hd"][name], "f", [])
    assert error.value.kind == "no valid value"


def test_series_and_masks_are_sorted_together_and_noted():
    notes: list[str] = []
    dates = DATES[[2, 0, 1]]
    s2 = modality("int16", bands=("B2",), mask=("cloud",))
    mask = column(3, 1, 2, dtype="uint8")
    out = clean_series(
        column(3, 1, 2, dtype="int16"), dates, s2, QUANTITIES["flair2"]["s2"], "f", notes, mask=mask
    )
    assert out.values[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert out.dates.tolist() == DATES.tolist()
    assert out.mask is not None
    assert out.mask[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert notes == ["m is not in the order of time: sorted"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4028235e38, -9999.0, -99_999.0, -500.0, 32_767.0])
def test_pixels_without_elevation_become_the_mean_of_the_others(value):
    notes: list[str] = []
    image = np.array([[[value, 100], [200, 600]], [[1, 2], [3, 4]]], np.float32)
    dem = modality("float32", bands=("DSM", "DTM"))
    out = clean_image(image, dem, QUANTITIES["flair_hub"]["dem"], "f", notes)
    assert out.tolist() == [[[300, 100], [200, 600]], [[1, 2], [3, 4]]]
    assert len(notes) == 1
    with pytest.raises(DatasetError, match="f: a band has no elevation at all"):
        clean_image(np.full((2, 2, 2), value, np.float32), dem, QUANTITIES["flair_hub"]["dem"], "f", [])


def test_an_image_without_any_valid_pixel_is_an_error():
    image = np.full((1, 2, 2), 9, np.uint8)
    quantity = QUANTITIES["s2_naip"]["naip"]
    with pytest.raises(DatasetError, match="f: no pixel has a valid value"):
        clean_image(image, modality("uint8"), quantity, "f", [], declared=np.ones((1, 2, 2), bool))


def test_every_modality_of_every_dataset_has_a_quantity():
    for name in datasets.known():
        assert {m.name for m in datasets.full_spec(name).modalities} == set(QUANTITIES[name]), name


def test_invalid_percentages_count_as_marked():
    notes: list[str] = []
    mask = np.array([0, 0.2, 99.5, 100, 255, -9999, np.nan, np.inf], np.float32)
    assert percent(mask, "m", notes).tolist() == [0, 1, 100, 100, 100, 100, 100, 100]
    assert percent(np.array([0, 100, 101, 255], np.uint8), "m", notes).tolist() == [0, 100, 100, 100]
    assert notes == ["m has values outside 0 to 100 percent or NaN: taken as marked"] * 2
    assert percent(np.array([0, 7], np.uint8), "m", notes).tolist() == [0, 7]
    assert len(notes) == 2


def test_stored_rasters_are_finite_or_nan():
    assert array_problem(np.array([1, 2], np.int16)) is None
    assert array_problem(np.array([[np.nan, -3.0], [2.0, 9e19]])) is None
    assert array_problem(np.array([[1, np.inf], [np.nan, -np.inf]], np.float16)) == (
        "has 2 values that are infinite or too large for a measurement, the first inf at (0, 1); "
        "store NaN where nothing was measured"
    )
    for value in (-3.4028235e38, 3.4028235e38, 9.96921e36, 1e20, -1e20):
        assert "has 1 values" in str(array_problem(np.array([0, value], np.float32)))
    assert "has 1 values" in str(array_problem(np.array([0, 1e20])))
    assert array_problem(np.full((2, 2), np.nan)) == "is NaN in every pixel; leave the tile out"


@pytest.mark.parametrize("dtype", ["float16", "float32", "int16"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 1, 2], (1, 3)),
        ([-3, -1, -2], (-3, -1)),
        ([-3, 5, 0], (-3, 5)),
        ([0, 7], (0, 7)),
        ([-7, 0], (-7, 0)),
        ([-4, -4], (-4, -4)),
    ],
)
def test_extremes(dtype, values, expected):
    assert extremes(np.array(values, dtype)) == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_extremes_of_nan_and_infinity(dtype):
    assert extremes(np.array([-np.inf, 2, np.inf], dtype)) == (-np.inf, np.inf)
    assert extremes(np.array([-np.inf, -2], dtype)) == (-np.inf, -2)
    for values in (
        [1, np.nan],
        [-1, np.nan],
        [1, -np.nan],
        [-1, -np.nan, 2],
        [np.nan, np.inf],
        [-np.nan, -np.inf],
    ):
        lowest, highest = extremes(np.array(values, dtype))
        assert np.isnan(lowest) or np.isnan(highest), values
    signed_zeros = np.array([[0.0, -0.0, 6e-8, -6e-8]], dtype)
    assert is_zero(signed_zeros).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("date", "valid"),
    [
        ((2020, 366, 23), True),
        ((2021, 366, 0), False),
        ((2000, 366, 0), True),
        ((1900, 366, 0), False),
        ((2020, 367, 0), False),
        ((2020, 0, 0), False),
        ((2020, 1, 0), True),
        ((2020, 1, 24), False),
        ((2020, 1, -1), False),
        ((0, 1, 0), False),
        ((10_000, 1, 0), False),
        ((-1, 1, 0), False),
    ],
)
def test_dates_are_in_the_calendar(date, valid):
    problem = dates_problem(np.array([date], np.int16))
    assert (problem is None) == valid
    if problem is not None:
        assert problem.startswith(f"has 1 invalid dates, the first {date}")


def test_dates_are_in_the_order_of_time():
    dates = np.array([[2020, 5, 3], [2020, 5, 3], [2020, 5, 4], [2020, 6, 0], [2021, 1, 0]], np.int16)
    assert dates_problem(dates) is None
    assert chronological(dates) is None
    for swapped in ([0, 1, 3, 2, 4], [0, 1, 2, 4, 3], [2, 1, 0, 3, 4]):
        assert "not in the order of time" in str(dates_problem(dates[swapped]))
        order = chronological(dates[swapped])
        assert order is not None
        assert dates[swapped][order].tolist() == dates.tolist()
    # Equal dates keep their order.
    order = chronological(dates[[4, 0, 1]])
    assert order is not None
    assert order.tolist() == [1, 2, 0]


def test_masks_and_shares_have_a_range():
    assert mask_problem(np.array([[0, 100]], np.uint8)) is None
    assert mask_problem(np.array([[0, 101], [255, 3]], np.uint8)) == (
        "has 2 values above 100 percent, the first 101 at (0, 1); use 0 to 100"
    )
    assert shares_problem(np.array([0, 1, 1.0005, 0.3], np.float32)) is None
    for value in (np.nan, -1e-3, 1.01, np.inf):
        problem = shares_problem(np.array([0, value, 0.5], np.float32))
        assert str(problem).startswith("has 1 shares outside 0 to 1, the first "), value
        assert "at (1)" in str(problem)


def test_masked_arrays_are_found_also_in_lists():
    data = np.arange(6.0).reshape(2, 3)
    assert masked_problem(data) is None
    assert masked_problem(np.ma.masked_equal(data, 99)) is None  # nothing is masked
    found = masked_problem(np.ma.masked_greater(data, 3))
    assert found == (
        "is a masked array with 2 masked values, the first at (1, 1); fill them with NaN: .filled(np.nan)"
    )
    assert masked_problem([data.astype(int), np.ma.masked_equal(data.astype(int), 3)]) == (
        "is a masked array with 1 masked values, the first at (1, 1, 0); fill them: .filled(value)"
    )


def test_invalid_pixels_are_marked_as_nodata_where_the_modality_stores_it():
    """Beside a cloud mask, which stays; the date without any valid value is left out."""
    values = np.full((3, 2, 1, 2), 300, np.int16)
    values[0] = -9999
    values[2, 1, 0, 0] = -10_000
    declared = np.zeros(values.shape, bool)
    declared[1, 0, 0, 1] = True
    cloud = np.array([7, 8, 9], np.uint8).reshape(3, 1, 1, 1) * np.ones((3, 1, 1, 2), np.uint8)
    s2 = modality("int16", bands=("B2", "B3"), mask=("nodata", "cloud"))
    for mask in (cloud, np.insert(cloud, 0, 0, axis=1)):  # with and without the band
        notes: list[str] = []
        out = clean_series(
            values, DATES, s2, QUANTITY_KINDS["reflectance"], "f", notes, declared=declared, mask=mask
        )
        assert out.mask is not None
        assert out.mask.dtype == np.uint8
        assert out.mask[:, 0].tolist() == [[[0, 100]], [[100, 0]]]
        assert out.mask[:, 1, 0, 0].tolist() == [8, 9]
        assert out.dates.tolist() == DATES[1:].tolist()
        assert out.values[:, :, 0].tolist() == [[[300, 0], [300, 0]], [[0, 300], [0, 300]]]
        assert notes == [
            "m has values that the file declares as nodata: marked as nodata",
            "m has fill values (-9999 or lower, or from 1e20): marked as nodata",
            "m has dates without any valid value: these dates are left out",
        ]
    # Marks that are there already stay.
    marked = np.insert(cloud, 0, np.array([0, 100, 0], np.uint8).reshape(3, 1, 1), axis=1)
    out = clean_series(
        values, DATES, s2, QUANTITY_KINDS["reflectance"], "f", [], declared=declared, mask=marked
    )
    assert out.mask is not None
    assert out.mask[:, 0].tolist() == [[[100, 100]], [[100, 0]]]
    alone = modality("int16", bands=("B2", "B3"), mask=("nodata",))
    out = clean_series(np.full((1, 2, 1, 2), 5, np.int16), DATES[:1], alone, QUANTITY_KINDS["any"], "f", [])
    assert out.mask is not None
    assert out.mask.tolist() == [[[[0, 0]]]]


def test_a_pixel_counts_with_all_its_bands_or_not_at_all():
    """Images of one polarisation among others."""
    values = np.full((3, 2, 1, 2), -12, np.float32)
    values[1, 1] = 0  # VH was not recorded
    radar = modality("float32", bands=("VV", "VH"), mask=("nodata",))
    out = clean_series(values, DATES, radar, QUANTITY_KINDS["backscatter_db"], "f", [])
    assert out.dates.tolist() == DATES[[0, 2]].tolist()
    assert not np.isnan(out.values).any()
    values[:, 1] = 0
    with pytest.raises(DatasetError, match="f: no pixel of any date has valid values in all bands") as error:
        clean_series(values, DATES, radar, QUANTITY_KINDS["backscatter_db"], "f", [])
    assert error.value.kind == "no valid value"


@pytest.mark.parametrize("kind", QUANTITY_KINDS)
def test_floats_of_any_quantity_are_nan_where_they_are_marked(kind):
    value = {"elevation": 12_000, "backscatter_linear": -1, "backscatter_db": 200}.get(kind, -np.inf)
    notes: list[str] = []
    series = clean_series(
        column(value, 0.25),
        DATES[:2],
        modality("float32", mask=("nodata",)),
        QUANTITY_KINDS[kind],
        "f",
        notes,
    )
    np.testing.assert_array_equal(series.values, column(np.nan, 0.25))
    assert series.mask is not None
    assert series.mask[:, 0].tolist() == [[[100, 0]], [[0, 0]]]
    (note,) = notes
    assert isinstance(note, InvalidNote)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("elevation", -9999, True),
        ("elevation", -32_768, True),
        ("elevation", 3.4028235e38, True),
        ("elevation", 12_000, False),
        ("reflectance", -10_000, True),
        ("reflectance", -12_345, False),
        ("reflectance", 9.96921e36, True),
        ("backscatter_db", -np.inf, True),
        ("backscatter_db", np.inf, False),
        ("backscatter_db", -9999, True),
        ("backscatter_db", 0, True),
        ("backscatter_linear", 0, True),
        ("backscatter_linear", -0.5, False),
        ("backscatter_linear", np.inf, False),
        ("any", 1e20, True),
        ("any", np.nan, True),
        ("any", 2e20, False),
        ("image", np.inf, False),
    ],
)
def test_strict_writers_stop_at_values_that_are_no_known_fill(kind, value, expected):
    quantity = QUANTITY_KINDS[kind]
    found = list(invalid_values(column(value, 0.25), modality("float32"), quantity, None))
    assert [known for _, _, known in found] == [expected]
    # A declared one never stops.
    declared = column(value, 0.25) == column(value, 0.25)
    assert all(
        known for _, _, known in invalid_values(column(value, 0.25), modality("float32"), quantity, declared)
    )


def test_the_example_of_an_undeclared_value_is_no_fill_value():
    values = column(-9999, -12_345, dtype="int16")
    values[0, 0, 0, 1] = -10_000
    notes: list[str] = []
    clean_series(values, DATES[:2], modality("int16"), QUANTITY_KINDS["reflectance"], "f", notes)
    note = notes[0]
    assert isinstance(note, InvalidNote)
    assert note.example == "-12345 at (1, 0, 0, 0)"
    again = pickle.loads(pickle.dumps(note))
    assert (again, again.example) == (note, note.example)


def test_integers_have_no_nan_and_elevation_of_a_series_has_means():
    notes: list[str] = []
    out = clean_series(
        column(0, 7, dtype="int16"),
        DATES[:2],
        modality("int16"),
        QUANTITY_KINDS["backscatter_db"],
        "f",
        notes,
    )
    assert out.values[:, 0, 0].tolist() == [[0, 5], [7, 5]]
    assert notes == ["m has zeros, which in decibels are no measurement: stored as 0"]
    dem = clean_series(
        column(-9999, 7), DATES[:2], modality("float32", bands=("DTM",)), QUANTITY_KINDS["elevation"], "f", []
    )
    assert dem.values[:, 0, 0].tolist() == [[0.5, 0.5], [7, 0.5]]


def test_complex_numbers_are_refused():
    numbers = np.ones((2, 1, 1, 2), np.complex64)
    with pytest.raises(DatasetError, match="f: is complex64; give real numbers"):
        clean_series(numbers, DATES[:2], modality("float32"), QUANTITY_KINDS["any"], "f", [])
    with pytest.raises(DatasetError, match="f: is complex64"):
        clean_image(numbers[0], modality("float32"), QUANTITY_KINDS["any"], "f", [])


@given(st.floats(width=32), st.floats(-1e6, 1e6), st.sampled_from(["float16", "float32", "float64"]))
def test_limits_hold_in_every_dtype(value, limit, dtype):
    """A limit that is between two numbers of a dtype is not rounded to the next one."""
    with np.errstate(over="ignore"):
        array = np.array([value], dtype)
    inside = QUANTITY_KINDS["any"].within(limit, None)
    assert inside.valid(array)[0] == (limit <= float(array[0]) < LARGEST)
    below = QUANTITY_KINDS["any"].within(None, limit)
    assert below.valid(array)[0] == (-LARGEST < float(array[0]) <= limit)


def test_every_kind_of_quantity_is_documented_with_the_modalities_that_are_of_it():
    text = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    for kind, quantity in QUANTITY_KINDS.items():
        row = rows[f"`{kind}`"]
        names = {
            name
            for dataset, modalities in QUANTITIES.items()
            for name, of in modalities.items()
            if of is quantity and dataset != "fuel_moisture"
        }
        assert all(f"`{name}`" in row for name in names), kind

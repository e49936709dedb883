"""Rasters that store nodata, and quantities: what is marked, noted or refused on every way to write shards."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Tile
from maestro_scale.shards import Manifest, Raster, Target, Writer, describe, write_shards
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.values import checked_tile, value_problems
from maestro_scale.shards.read.preview import read_first_sample
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.from_arrays import make_tile

DAYS = ["2021-01-01", "2021-02-01"]
TARGETS = [
    Target("cover", "segmentation", ("soil", "tree", "void"), ignored=(2,), resolution_m=10),
    Target("kind", "classification", ("oak", "pine")),
    Target("height", "regression", units="m", resolution_m=10),
]
LABELS = {"cover": np.zeros((2, 2), int), "kind": "oak", "height": np.ones((2, 2))}


def spec_of(dtype: str, mask_bands: tuple[str, ...] = ("nodata",), quantity: str = "") -> DatasetSpec:
    raster = Raster("x", ("VV", "b"), 10, dtype, 2, num_dates=2, mask_bands=mask_bands, quantity=quantity)
    return describe("mine", 20, [raster], TARGETS)


def values(dtype: str, bad: object = None) -> np.ndarray:
    """(2, 2, 2, 2): 10 to 25, ``bad`` in the first pixel of the first date and band."""
    array = np.arange(10, 26).reshape(2, 2, 2, 2).astype(dtype)
    if bad is not None:
        array[0, 0, 0, 0] = bad
    return array


def tile_of(spec: DatasetSpec, array: object, masks: np.ndarray | None = None, days=DAYS, **labels) -> Tile:
    given_masks = None if masks is None else {"x": masks}
    return make_tile(spec, "k", {"x": array}, {"x": days}, masks=given_masks, targets={**LABELS, **labels})


def stored(spec: DatasetSpec, tile: Tile) -> Tile:
    """The tile as it is written; ``verify`` must find nothing in it."""
    done = checked_tile(tile, spec)
    fields = {"x": done.arrays["x"], "x.dates": done.dates["x"], "ref_date": done.ref_date}
    fields |= {"x.mask": done.masks["x"]} if "x" in done.masks else {}
    fields |= {f"target.{n}": v for n, v in done.targets.items()}
    assert value_problems(fields, spec) == []
    return done


FIRST = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 0]]], bool)  # the marks if the first pixel is invalid


@pytest.mark.parametrize(
    ("dtype", "quantity", "bad", "kind"),
    [
        ("float32", "", np.nan, "NaN"),
        ("float32", "", np.inf, "infinite values"),
        ("float16", "", -np.inf, "infinite values"),
        ("float32", "", 1e20, "fill values"),
        ("float64", "", -1e20, "fill values"),
        ("float32", "", 3.4028235e38, "fill values"),
        ("float64", "", 9.969209968386869e36, "fill values"),
        ("int16", "reflectance", -32_768, "fill values (-9999 or lower, or from 1e20)"),
        ("int32", "reflectance", -9999, "fill values (-9999 or lower, or from 1e20)"),
        ("float32", "backscatter_linear", 0.0, "zeros, which in linear power are no measurement"),
        ("float32", "backscatter_linear", -0.0, "zeros, which in linear power are no measurement"),
        ("float16", "backscatter_linear", -0.0, "zeros, which in linear power are no measurement"),
        ("float32", "backscatter_linear", -1e-3, "fill values (negative or above 1e6)"),
        ("float32", "backscatter_db", 0, "zeros, which in decibels are no measurement"),
        ("int16", "backscatter_db", -9999, "fill values (outside -100 to 100 dB)"),
        ("float32", "backscatter_db", 101, "fill values (outside -100 to 100 dB)"),
        ("float32", "elevation", -9999, "pixels without elevation"),
        ("int32", "elevation", -32_768, "pixels without elevation"),
        ("float32", "elevation", 9001, "pixels without elevation"),
    ],
)
def test_an_invalid_value_is_marked_and_noted(dtype, quantity, bad, kind):
    spec = spec_of(dtype, quantity=quantity)
    tile = stored(spec, tile_of(spec, values(dtype, bad)))
    assert tile.notes == (f"x has {kind}: marked as nodata",)
    np.testing.assert_array_equal(tile.masks["x"][:, 0], 100 * FIRST)
    # The pixel is empty in all bands; the others are as they were.
    expected = values(dtype)
    expected[0, :, 0, 0] = np.nan if np.dtype(dtype).kind == "f" else 0
    np.testing.assert_array_equal(tile.arrays["x"], expected)


@pytest.mark.parametrize(
    "quantity", ["reflectance", "backscatter_linear", "backscatter_db", "elevation", "any"]
)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, 1e7, -1e7, 1e20])
def test_without_a_place_for_nodata_an_impossible_value_is_refused(quantity, bad):
    spec = spec_of("float32", (), quantity)
    possible = {"reflectance": [1e7], "any": [1e7, -1e7]}.get(quantity, [])
    tile = tile_of(spec, values("float32", bad))
    if bad in possible:
        checked_tile(tile, spec)
        return
    with pytest.raises(
        DatasetError, match=r"tile k: x has 1 values that are .* the first .* at \(0, 0, 0, 0\); "
    ) as error:
        checked_tile(tile, spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
@pytest.mark.parametrize("listed", [False, True])
def test_masks_of_numpy_become_nodata(dtype, listed):
    spec = spec_of(dtype)
    masked = np.ma.masked_less(values(dtype, 1), 5)
    tile = stored(spec, tile_of(spec, list(masked) if listed else masked))
    assert tile.notes == ("x has values that numpy masks: marked as nodata",)
    np.testing.assert_array_equal(tile.masks["x"][:, 0], 100 * FIRST)
    assert type(tile.arrays["x"]) is np.ndarray
    assert tile.arrays["x"].dtype == dtype
    # A tile whose arrays are masked, as a reader may return it.
    tile = tile_of(spec, values(dtype))
    again = stored(spec, replace(tile, arrays={"x": masked}))
    np.testing.assert_array_equal(again.masks["x"][:, 0], 100 * FIRST)


def test_masks_of_numpy_become_nan_where_nothing_stores_nodata():
    spec = spec_of("float32", ("cloud",))
    tile = tile_of(spec, np.ma.masked_less(values("float32", 1), 5), np.zeros((2, 1, 2, 2), np.uint8))
    tile = stored(spec, tile)
    assert tile.notes == ("x has values that numpy masks: stored as NaN",)
    assert np.isnan(tile.arrays["x"]).sum() == 1
    assert np.isnan(tile.arrays["x"][0, 0, 0, 0])
    assert not tile.masks["x"].any()


def test_masked_labels_are_missing():
    spec = spec_of("float32", ())
    cover = np.ma.masked_equal(np.array([[1, -1], [255, 1]]), -1)
    cover = np.ma.masked_equal(cover, 255)
    height = np.ma.masked_less(np.array([[1, -9999], [3, 4]]), 0)
    kind = np.ma.masked_equal(np.array(7), 7)
    tile = stored(spec, tile_of(spec, values("float32"), cover=cover, height=height))
    assert tile.targets["cover"].tolist() == [[1, 2], [2, 1]]
    np.testing.assert_array_equal(tile.targets["height"], np.array([[1, np.nan], [3, 4]], np.float32))
    assert set(tile.notes) == {
        "cover has labels that numpy masks: stored as missing",
        "height has labels that numpy masks: stored as missing",
    }
    one = replace(tile, targets={**tile.targets, "kind": np.ma.masked_equal(np.array([7], np.int16), 7)})
    assert checked_tile(one, spec).targets["kind"].tolist() == [-1]
    assert make_tile(spec, "k", {"x": values("f4")}, {"x": DAYS}, targets={**LABELS, "kind": kind}).targets[
        "kind"
    ].tolist() == [-1]


@pytest.mark.parametrize("label", [-1, 3, 255, 256, 1.0, np.nan])
def test_labels_that_are_neither_a_class_nor_ignored_are_refused(label):
    spec = spec_of("float32", ())
    with pytest.raises(DatasetError, match="cover"):
        checked_tile(tile_of(spec, values("float32"), cover=np.array([[0, label], [1, 2]])), spec)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (FIRST[:, None], [100, 0]),
        (np.array([12, 0]).reshape(2, 1, 1, 1) * np.ones((2, 1, 2, 2), int), [12, 0]),
        (np.array([11.5, 0]).reshape(2, 1, 1, 1) * np.ones((2, 1, 2, 2)), [12, 0]),
        (np.array([100, 3]).reshape(2, 1, 1, 1) * np.ones((2, 1, 2, 2), np.uint8), [100, 3]),
        (
            np.array([100, 255]).reshape(2, 1, 1, 1) * np.ones((2, 1, 2, 2), int),
            "1 values above 100|4 values above",
        ),
        (
            np.array([100, -1]).reshape(2, 1, 1, 1) * np.ones((2, 1, 2, 2), int),
            "values outside of 0 to 100 percent",
        ),
        (
            np.array([100, np.nan]).reshape(2, 1, 1, 1) * np.ones((2, 1, 2, 2)),
            "values outside of 0 to 100 percent",
        ),
        (
            np.array([0.5, 1]).reshape(2, 1, 1, 1) * np.ones((2, 1, 2, 2)),
            "numbers from 0 to 1; give percentages",
        ),
        (np.full((2, 1, 2, 2), "x"), "expected uint8"),
        (np.zeros((2, 3, 2, 2), np.uint8), "expected uint8"),
    ],
)
@pytest.mark.parametrize("bands", [("cloud",), ("cloud", "nodata"), ("nodata", "cloud")])
def test_masks_are_percentages(mask, expected, bands):
    """Also without the band of nodata, which is added."""
    spec = spec_of("int16", bands)
    if isinstance(expected, str):
        with pytest.raises(DatasetError, match=expected):
            checked_tile(tile_of(spec, values("int16"), mask), spec)
        return
    tile = stored(spec, tile_of(spec, values("int16"), mask))
    cloud = bands.index("cloud")
    assert tile.masks["x"].shape == (2, len(bands), 2, 2)
    assert tile.masks["x"][:, cloud, 0, 0].tolist() == expected
    assert not np.delete(tile.masks["x"], cloud, axis=1).any()


@pytest.mark.parametrize("bands", [("nodata",), ("cloud", "nodata")])
@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (3, 1, 2, 2), (2, 2, 2, 3), (2, 2, 2), (2,), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", ["uint8", "float64", "<U1"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_masks_of_another_shape_or_type_are_refused_in_one_line(bands, shape, dtype, is_masked):
    spec = spec_of("int16", bands)
    array = np.ma.masked_less(values("int16", 1), 5) if is_masked else values("int16")
    tile = replace(tile_of(spec, array), masks={"x": np.zeros(shape, dtype)})
    with pytest.raises(DatasetError, match=r"tile k: x\.mask is ") as error:
        checked_tile(tile, spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given_value", [1, 100, 255])
def test_marks_that_are_given_count_and_empty_the_pixel(given_value):
    spec = spec_of("int16", ("cloud", "nodata"), "reflectance")
    mask = np.zeros((2, 2, 2, 2), np.uint8)
    mask[0, 1, 0, 0] = given_value
    array = values("int16", -9999)
    array[1, 1, 1, 1] = -10_000
    tile = stored(spec, tile_of(spec, array, mask))
    assert tile.masks["x"][:, 1].tolist() == [[[100, 0], [0, 0]], [[0, 0], [0, 100]]]
    assert tile.arrays["x"][0, :, 0, 0].tolist() == tile.arrays["x"][1, :, 1, 1].tolist() == [0, 0]
    # Only what was not marked is noted.
    assert tile.notes == ("x has fill values (-9999 or lower, or from 1e20): marked as nodata",)
    array[1, 1, 1, 1] = 7
    assert stored(spec, tile_of(spec, array, mask)).notes == ()


def test_a_raster_without_any_valid_pixel_is_refused():
    spec = spec_of("int16", quantity="reflectance")
    with pytest.raises(DatasetError, match=r"x\.mask marks every pixel as nodata; leave the tile out"):
        checked_tile(tile_of(spec, np.full((2, 2, 2, 2), -9999, np.int16)), spec)


@pytest.mark.parametrize(
    ("dtype", "quantity", "value", "note"),
    [
        (
            "float32",
            "",
            -9999,
            "x has the value -9999, a usual fill value: stored as it is; if it is one, declare it",
        ),
        (
            "int16",
            "",
            -32_768,
            "x has the value -32768, a usual fill value: stored as it is; if it is one, declare it",
        ),
        (
            "uint16",
            "",
            65_535,
            "x has the value 65535, a usual fill value: stored as it is; if it is one, declare it",
        ),
        (
            "float32",
            "reflectance",
            70_000,
            "x has values outside of -5000 to 65000: stored as they are; check units and scale",
        ),
        (
            "float32",
            "backscatter_db",
            -80,
            "x has values outside of -70 to 50: stored as they are; check units and scale",
        ),
        ("uint8", "image", 255, None),
        ("bool", "", True, None),
        ("int16", "reflectance", -4758, None),
        ("float32", "", 65_535, None),
    ],
)
def test_remarkable_values_are_stored_and_noted(dtype, quantity, value, note):
    spec = spec_of(dtype, (), quantity)
    array = values(dtype, value)
    tile = stored(spec, tile_of(spec, array))
    np.testing.assert_array_equal(tile.arrays["x"], array)
    assert tile.notes == (() if note is None else (note,))
    if dtype.startswith("float"):
        array[1, 1, 1, 1] = np.nan
        assert stored(spec, tile_of(spec, array)).notes == tile.notes


def test_a_fill_value_among_numeric_labels_is_noted():
    spec = spec_of("float32")
    tile = stored(spec, tile_of(spec, values("float32"), height=np.array([[1, -9999], [np.nan, 4]])))
    np.testing.assert_array_equal(tile.targets["height"], np.array([[1, -9999], [np.nan, 4]], np.float32))
    assert tile.notes == (
        "height has the value -9999, a usual fill value: stored as it is; if it is one, declare it",
    )


def test_complex_numbers_are_refused():
    spec = spec_of("float32")
    with pytest.raises(DatasetError, match="x is complex64"):
        checked_tile(tile_of(spec, values("complex64")), spec)


def test_duplicate_dates_are_valid_and_keep_their_order():
    spec = spec_of("int16", ())
    days = ["2021-03-01"] * 2
    tile = stored(spec, tile_of(spec, values("int16"), days=days))
    np.testing.assert_array_equal(tile.arrays["x"], values("int16"))
    assert tile.notes == ()


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (
            ["1899-12-30", "2021-01-01"],
            "x has dates before 1900 or after 2100: stored as they are; check how missing dates are written",
        ),
        (["0001-01-01", "2021-01-01"], "x has dates before 1900"),
        (["2021-01-01", "9999-12-31"], "x has dates before 1900"),
        (["1947-06-01", "2021-01-01"], None),
    ],
)
def test_dates_of_other_centuries_are_noted(days, message):
    spec = spec_of("int16", ())
    notes = stored(spec, tile_of(spec, values("int16"), days=days)).notes
    assert (notes == ()) if message is None else (len(notes) == 1 and notes[0].startswith(message))


@pytest.mark.parametrize(
    "day", [np.datetime64("NaT"), "", "0000-01-01", "20210230", None, 5, np.datetime64("12000-01-01")]
)
def test_dates_that_are_none_are_refused(day):
    with pytest.raises(DatasetError, match="has the date"):
        tile_of(spec_of("int16", ()), values("int16"), days=[day, "2021-01-01"])


@dataclass(frozen=True)
class Raw:
    """Three tiles: without faults, with a declared gap, and with an infinite value."""

    spec: DatasetSpec

    def keys(self) -> list[str]:
        return ["a", "b", "c"]

    def read(self, key: str) -> Tile:
        bad = {"a": None, "b": np.nan, "c": np.inf}[key]
        return replace(tile_of(self.spec, values("float32", bad)), key=key)


def test_kinds_are_counted_in_the_manifest_and_strict_stops_at_the_first_undeclared(tmp_path):
    raw = Raw(spec_of("float32"))
    manifest = write_shards(raw, str(tmp_path / "out"), "train", strict=False)
    assert manifest is not None
    assert manifest.notes == {
        "x has NaN: marked as nodata": 1,
        "x has infinite values: marked as nodata": 1,
    }
    assert manifest.examples["x has infinite values: marked as nodata"] == "c"
    assert verify(str(tmp_path / "out")) == []
    undeclared = r"marked as nodata \(the first: inf at \(0, 0, 0, 0\)\); nothing declares it as nodata"
    with pytest.raises(DatasetError, match=f"tile c: x has infinite values: {undeclared}"):
        write_shards(raw, str(tmp_path / "strict"), "train", strict=True)
    assert not (tmp_path / "strict" / "manifest.json").exists()
    for strict in (False, True):
        folder = tmp_path / f"writer-{strict}"
        with Writer(str(folder), raw.spec, "train", strict=strict) as writer:
            writer.add(raw.read("b"))
            if strict:
                with pytest.raises(DatasetError, match="tile c: x has infinite values"):
                    writer.add(raw.read("c"))
            else:
                writer.add(raw.read("c"))
        assert Manifest.load(str(folder)).notes["x has NaN: marked as nodata"] == 1


def test_the_quantity_and_the_marks_are_part_of_the_shards(tmp_path):
    spec = spec_of("float32", quantity="backscatter_db")
    with Writer(str(tmp_path), spec, "train") as writer:
        writer.add(tile_of(spec, values("float32", 0)))
    manifest = Manifest.load(str(tmp_path))
    assert manifest.spec.modalities[0].quantity == "backscatter_db"
    sample = read_first_sample(str(tmp_path), manifest.shards[0])
    assert sample.array("x.mask")[:, 0].tolist() == (100 * FIRST).tolist()
    with pytest.raises(ManifestError, match=r"quantity: unknown quantity 'decibels'"):
        spec_of("float32", quantity="decibels")
    assert '"quantity"' not in replace(manifest, spec=spec_of("float32")).dumps()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("x.mask", (0, 0, 1, 1), 50),
            r"x\.mask has 1 values in band nodata that are neither 0 nor 100, the first 50",
        ),
        (
            ("x.mask", (0, 0, 0, 0), 0),
            r"x\.mask does not mark 1 pixels that are NaN as nodata, the first at \(0, 0, 0\)",
        ),
        (
            ("x", (1, 1, 1, 1), 200),
            r"x has 1 values that are no backscatter_db .* the first 200 at \(1, 1, 1, 1\)",
        ),
        (("x", (1, 1, 1, 1), np.inf), "x has 1 values that are infinite"),
    ],
)
def test_verify_finds_what_a_writer_of_others_left(tmp_path, monkeypatch, change, message):
    spec = spec_of("float32", quantity="backscatter_db")
    tile = checked_tile(tile_of(spec, values("float32", 0)), spec)
    field, index, value = change
    array = (tile.masks if field.endswith(".mask") else tile.arrays)["x"]
    array[index] = value
    monkeypatch.setattr("maestro_scale.shards.write.writer.checked_tile", lambda tile, spec, strict: tile)
    with Writer(str(tmp_path), spec, "train") as writer:
        writer.add(tile)
    (problem,) = verify(str(tmp_path))
    assert re.search(message, problem), problem


def test_a_band_of_percentages_from_before_the_marks_verifies(tmp_path, monkeypatch):
    """Shards of earlier revisions say no quantity, and may have a mask band of this name like any other."""
    spec = spec_of("int16")
    monkeypatch.setattr("maestro_scale.shards.write.writer.checked_tile", lambda tile, spec, strict: tile)
    mask = np.array([0, 7, 60, 100], np.uint8).reshape(1, 1, 2, 2).repeat(2, 0)
    for value in (100, 101):
        mask[1, 0, 0, 0] = value
        with Writer(str(tmp_path / str(value)), spec, "train") as writer:
            writer.add(replace(checked_tile(tile_of(spec, values("int16")), spec), masks={"x": mask}))
    assert verify(str(tmp_path / "100")) == []
    (problem,) = verify(str(tmp_path / "101"))
    assert "101" in problem


_SPECIAL = [0, -0.0, 1, -1, -9999, -10_000, -32_768, 1e6, 1e20, -1e20, 3.4028235e38, np.inf, -np.inf, np.nan]


@settings(max_examples=200)
@given(
    st.sampled_from(["float16", "float32", "float64", "int16", "uint16", "uint8", "int32"]),
    st.sampled_from(["", "reflectance", "backscatter_linear", "backscatter_db", "elevation", "image", "any"]),
    st.sampled_from([(), ("nodata",), ("cloud", "nodata")]),
    st.lists(st.sampled_from([12.5, 20] * len(_SPECIAL) + _SPECIAL), min_size=16, max_size=16),
    st.none() | st.lists(st.booleans(), min_size=16, max_size=16),
    st.permutations([0, 1]),
)
def test_whatever_is_given_only_measurements_are_stored(dtype, quantity, bands, numbers, masked, order):
    """Either an error in one line, or a tile in which verify finds nothing, and whose unmarked values are as given."""
    spec = spec_of(dtype, bands, quantity)
    array = np.array(numbers).reshape(2, 2, 2, 2)
    if np.dtype(dtype).kind != "f":
        info = np.iinfo(dtype)
        array = np.clip(np.nan_to_num(array), info.min, info.max)
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    given_array = array if masked is None else np.ma.array(array, mask=np.reshape(masked, array.shape))
    cloud = np.zeros((2, 1, 2, 2), np.uint8) if "cloud" in bands else None
    refused = ""
    try:
        tile = stored(spec, tile_of(spec, given_array, cloud, days=[DAYS[i] for i in order]))
    except DatasetError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        return
    assert tile.dates["x"][:, 1].tolist() == [1, 32]
    expected = np.ma.filled(np.ma.asarray(given_array).astype(float), np.nan)[list(order)]
    seen = tile.arrays["x"].astype(float)
    if "nodata" in bands:
        marked = np.broadcast_to(tile.masks["x"][:, -1:] > 0, seen.shape)
        assert not marked.all()
        seen[marked] = np.nan
    else:
        np.testing.assert_array_equal(np.isnan(seen), np.isnan(expected))
    measured = ~np.isnan(seen)
    np.testing.assert_array_equal(seen[measured], expected[measured])
    # Once more changes nothing.
    again = stored(spec, tile)
    np.testing.assert_array_equal(again.arrays["x"], tile.arrays["x"])
    assert set(again.notes) == set(tile.notes)

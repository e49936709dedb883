"""Values that are no measurement: refused or sorted on every write path, and found by ``verify``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

from maestro_scale.datasets.spec import DatasetError, Tile
from maestro_scale.shards import Manifest, Raster, Target, Writer, describe, write_shards
from maestro_scale.shards.read.preview import read_first_sample
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.from_arrays import make_tile

X = Raster("x", ("a", "b"), 10, "float32", patch=2, num_dates=2, mask_bands=("cloud",))
N = Raster("n", ("a",), 10, "int16", patch=2)
SPEC = describe(
    "mine",
    60,
    [X, N],
    [Target("m", "multilabel", ("a", "b")), Target("s", "segmentation", ("a", "b"), resolution_m=10)],
)
DAYS = ["2021-01-01", "2021-02-01", "2021-03-01"]


def x() -> np.ndarray:
    """(3, 2, 6, 6): 100 date + 10 band + row + column / 10."""
    t, b, r, c = np.ogrid[:3, :2, :6, :6]
    return (100 * t + 10 * b + r + c / 10).astype(np.float32)


def at(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


def masked(array: np.ndarray) -> np.ndarray:
    return np.ma.masked_equal(array, array.reshape(-1)[0])


N_PIXELS = np.arange(36, dtype=np.int16).reshape(1, 6, 6)
CLEAR = np.zeros((3, 1, 6, 6), np.uint8)
LABELS = np.zeros((6, 6), np.uint8)
GIVEN = {
    "arrays": {"x": x(), "n": N_PIXELS},
    "dates": {"x": DAYS, "n": "2021-07-01"},
    "masks": {"x": CLEAR},
    "targets": {"m": [1, 0], "s": LABELS},
}


def given(part: str, name: str, value: object) -> dict:
    return {**GIVEN, part: {**GIVEN[part], name: value}}


INVALID = [
    (given("arrays", "x", at(x(), (1, 0, 2, 3), np.inf)), r"x has 1 values .* the first inf at \(1, 0, 2, 3\)"),
    (given("arrays", "x", at(x(), (2, 1, 0, 0), -3.4028235e38)), r"x has 1 values .* -3.40282e\+38 at \(2, 1, 0, 0\)"),
    (given("arrays", "x", np.full_like(x(), np.nan)), "x is NaN in every pixel"),
    (given("masks", "x", at(CLEAR, (0, 0, 5, 5), 101)), r"x\.mask has 1 values above 100 percent, the first 101"),
    (given("targets", "m", [np.nan, 1]), r"target\.m has 1 shares outside 0 to 1, the first nan at \(0\)"),
    (given("targets", "m", {"b": -1}), r"target\.m has 1 shares outside 0 to 1, the first -1 at \(1\)"),
    (given("targets", "m", [0, 1.5]), r"target\.m has 1 shares"),
]  # fmt: skip
MASKED = [
    (given("arrays", "n", masked(N_PIXELS)), r"n is a masked array with 1 masked values, the first at "
     r"\(0, 0, 0, 0\); fill them: \.filled\(value\), or give the raster the mask band \"nodata\""),
    (given("masks", "x", masked(CLEAR)), r"x\.mask is a masked array with 108 masked values"),
    (given("targets", "s", masked(LABELS)), "s is a masked array with 36 masked values.*ignored class"),
    (given("targets", "m", masked(np.ones(2))), "m is a masked array"),
    (given("dates", "n", np.ma.array(np.array(["2021-07-01"], "datetime64[D]"), mask=[True])), r"n\.dates is a masked"),
]  # fmt: skip


@pytest.mark.parametrize(("tile", "message"), [*INVALID, *MASKED])
def test_invalid_values_are_refused_in_one_line_that_names_the_tile(tmp_path, tile, message):
    with (
        pytest.raises(DatasetError, match=f"tile k: {message}") as error,
        Writer(str(tmp_path), SPEC, "train") as writer,
    ):
        writer.add_arrays("k", **tile)
    assert "\n" not in str(error.value)
    assert error.value.kind == "invalid values"
    assert not (tmp_path / "manifest.json").exists()


def test_masked_arrays_of_a_tile_are_refused_too(tmp_path):
    tile = make_tile(SPEC, "k", **GIVEN)
    for part, name in (("arrays", "n"), ("dates", "x"), ("masks", "x"), ("targets", "s")):
        array = getattr(tile, part)[name]
        changed = replace(tile, **{part: {**getattr(tile, part), name: masked(array)}})
        with (
            pytest.raises(DatasetError, match="is a masked array"),
            Writer(str(tmp_path), SPEC, "train") as w,
        ):
            w.add(changed)


@pytest.mark.parametrize("date", [(2021, 0, 0), (2021, 366, 0), (2020, 367, 0), (2021, 5, 24), (0, 5, 0)])
@pytest.mark.parametrize("field", ["dates", "ref_date"])
def test_dates_that_are_not_in_the_calendar_are_refused(tmp_path, date, field):
    tile = make_tile(SPEC, "k", **GIVEN)
    value = np.array(date, np.int16)
    changed = {"ref_date": value} if field == "ref_date" else {"dates": {**tile.dates, "n": value[None]}}
    with (
        pytest.raises(DatasetError, match=r"tile k: (n\.dates|ref_date) has 1 invalid dates, the first \("),
        Writer(str(tmp_path), SPEC, "train") as writer,
    ):
        writer.add(replace(tile, **changed))


def test_dates_are_sorted_with_images_and_masks_and_counted(tmp_path):
    order = [2, 0, 1]
    with Writer(str(tmp_path), SPEC, "train") as writer:
        cloud = CLEAR + np.arange(3, dtype=np.uint8)[:, None, None, None]
        writer.add_arrays(
            "k",
            {"x": x()[order], "n": N_PIXELS},
            {"x": [DAYS[i] for i in order], "n": "2021-07-01"},
            masks={"x": cloud[order]},
            targets={"m": [1, 0], "s": LABELS},
        )
    manifest = Manifest.load(str(tmp_path))
    assert manifest.notes == {"x is not in the order of time: sorted": 1}
    sample = read_first_sample(str(tmp_path), manifest.shards[0])
    np.testing.assert_array_equal(sample.array("x"), x())
    assert sample.array("x.dates")[:, 1].tolist() == [1, 32, 60]
    assert sample.array("x.mask")[:, 0, 0, 0].tolist() == [0, 1, 2]
    # The reference date is the earliest date, not the first that was given.
    assert sample.array("ref_date").tolist() == [2021, 1, 0]
    assert verify(str(tmp_path)) == []


def test_nan_and_unmasked_masked_arrays_are_stored(tmp_path):
    pixels = at(x(), (1, 1, 2, 3), np.nan)
    with Writer(str(tmp_path), SPEC, "train") as writer:
        writer.add_arrays("k", **given("arrays", "x", np.ma.masked_equal(pixels, 12345)))
    sample = read_first_sample(str(tmp_path), Manifest.load(str(tmp_path)).shards[0])
    np.testing.assert_array_equal(sample.array("x"), pixels)
    assert verify(str(tmp_path)) == []


@dataclass(frozen=True)
class Raw:
    """A raw dataset of a reader that checks nothing: tiles 0 and 1 are valid, 1 is out of order, 2 is infinite."""

    spec = SPEC

    def keys(self) -> list[str]:
        return ["0", "1", "2"]

    def read(self, key: str) -> Tile:
        tile = make_tile(SPEC, key, **GIVEN)
        if key == "1":
            return replace(tile, dates={**tile.dates, "x": tile.dates["x"][::-1]})
        return (
            tile if key == "0" else replace(tile, arrays={**tile.arrays, "x": at(x(), (0, 0, 0, 0), np.inf)})
        )


def test_tiles_of_any_reader_are_checked(tmp_path):
    with pytest.raises(DatasetError, match="tile 2: x has 1 values that are infinite"):
        write_shards(Raw(), str(tmp_path / "strict"), "train")
    manifest = write_shards(Raw(), str(tmp_path / "out"), "train", strict=False)
    assert manifest is not None
    assert manifest.notes == {"left out: invalid values": 1, "x is not in the order of time: sorted": 1}
    assert manifest.examples["x is not in the order of time: sorted"] == "1"
    assert sum(shard.samples for shard in manifest.shards) == 2


def test_verify_finds_the_values_that_writers_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr("maestro_scale.shards.write.writer.checked_tile", lambda tile, spec, strict: tile)
    for i, (tile, message) in enumerate(
        [
            *INVALID,
            (given("dates", "x", DAYS[::-1]), r"x\.dates are not in the order of time"),
        ]
    ):
        folder = tmp_path / str(i)
        with Writer(str(folder), SPEC, "train") as writer:
            writer.add_arrays("k", **tile)
        (problem,) = verify(str(folder))
        assert problem.startswith("train-000000.tar: tile k: "), problem
        assert re.search(message, problem), problem

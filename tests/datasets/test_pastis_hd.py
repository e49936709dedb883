"""The reader of PASTIS-HD against tiles written by hand, and against bad input."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from testkit.pastis_tile import S1A_DAYS, TILE, decibels, labels, metadata, series, spot_pixels
from typer.testing import CliRunner

from maestro_scale import datasets
from maestro_scale.cli import app
from maestro_scale.datasets.pastis_hd.reader import CLASSES, SPEC
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.shards.format.fields import check_tile
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source


def read(src: Path, split: str = "train", modalities: tuple[str, ...] | None = None):
    reader = datasets.open_raw("pastis_hd", src, split, modalities)
    tile = reader.read(TILE)
    check_tile(tile, reader.spec)
    return tile


def test_pixels_and_dates_equal_the_files_in_chronological_order(write_pastis):
    tile = read(write_pastis())
    np.testing.assert_array_equal(tile.arrays["spot"], spot_pixels()[None])
    assert tile.dates["spot"].tolist() == [[2019, 182, 0]]
    assert tile.ref_date.tolist() == [2019, 182, 0]
    assert tile.arrays["s2"].dtype == np.int16
    np.testing.assert_array_equal(tile.arrays["s2"], series(3, 10).astype(np.int16))
    assert tile.dates["s2"].tolist() == [[2018, 267, 0], [2018, 365, 0], [2020, 60, 0]]
    np.testing.assert_array_equal(tile.arrays["s1_asc"], decibels())
    assert tile.dates["s1_asc"].tolist() == [[2018, 245, 0]] * 2
    np.testing.assert_array_equal(tile.arrays["s1_des"], decibels()[::-1])
    assert tile.dates["s1_des"].tolist() == [[2018, 337, 0], [2019, 3, 0]]
    assert "s1_des is not in the order of time: sorted" in tile.notes
    assert "s2 has fewer than 16 dates: some are seen twice" in tile.notes


def test_labels_are_the_first_channel_and_void_is_ignored(write_pastis):
    tile = read(write_pastis())
    np.testing.assert_array_equal(tile.targets["crop_type"], labels()[0])
    target = SPEC.target("crop_type")
    assert (target.classes[19], target.ignored, target.num_outputs) == ("void", (19,), 19)
    assert (CLASSES[0], CLASSES[1], CLASSES[3], CLASSES[18]) == ("background", "meadow", "corn", "sorghum")


def test_shares_cover_crops_but_not_background_and_void(write_pastis):
    tile = read(write_pastis())
    shares = dict(
        zip(SPEC.target("crops_present").classes, tile.targets["crops_present"].tolist(), strict=True)
    )
    assert len(shares) == 18
    quarter = 0.25 * 127 / 128
    assert {k: v for k, v in shares.items() if v} == {"meadow": quarter, "sorghum": quarter}


def test_dates_may_be_objects_or_text_and_ids_a_column(write_pastis):
    src = write_pastis()
    before = read(src)
    (src / "metadata.geojson").write_text(json.dumps(metadata((TILE,), as_text=True)))
    assert read(src).dates["s2"].tolist() == before.dates["s2"].tolist()
    content = metadata((TILE,))
    del content["features"][0]["id"]
    (src / "metadata.geojson").write_text(json.dumps(content))
    assert read(src).key == TILE


def test_tile_ids_are_preferred_to_row_ids(write_pastis):
    src = write_pastis(("10000", "10001"))
    content = metadata(("10000", "10001"))
    for row, feature in enumerate(content["features"]):
        feature["id"] = row
        feature["properties"]["id"] = 10_001 - row  # also where the row ids look like tile ids
    content["features"][1]["properties"]["dates-S2"] = {"0": 20190105, "1": 20190104, "2": 20190103}
    (src / "metadata.geojson").write_text(json.dumps(content))
    reader = datasets.open_raw("pastis_hd", src, "fold_2")
    assert reader.keys() == ["10001"]
    assert reader.read("10001").dates["s2"][:, 1].tolist() == [3, 4, 5]
    content["features"][1]["properties"]["ID_PATCH"] = 10_000
    (src / "metadata.geojson").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="has two rows with ID_PATCH '10000'"):
        datasets.open_raw("pastis_hd", src, "fold_2")


def test_dates_of_other_modalities_are_not_required(write_pastis):
    src = write_pastis()
    content = metadata((TILE,))
    for column in ("dates-S1A", "dates-S1D"):
        del content["features"][0]["properties"][column]
    (src / "metadata.geojson").write_text(json.dumps(content))
    assert read(src, modalities=("s2",)).dates.keys() == {"s2"}
    with pytest.raises(DatasetError, match="has no column 'dates-S1A'"):
        read(src, modalities=("s2", "s1_asc"))


def test_fill_values_of_sentinel_2_are_no_data(write_pastis):
    src = write_pastis()
    values = series(3, 10).astype(np.int16)
    values[0, 1, 2, 3], values[2] = -10_000, -9999
    np.save(src / f"DATA_S2/S2_{TILE}.npy", values)
    tile = read(src)
    expected = series(3, 10).astype(np.int16)[:2]
    expected[0, 1, 2, 3] = 0
    np.testing.assert_array_equal(tile.arrays["s2"], expected)
    assert tile.dates["s2"].tolist() == [[2018, 267, 0], [2018, 365, 0]]
    assert [n for n in tile.notes if n.startswith("s2 has")][:2] == [
        "s2 has fill values (-9999 or lower, or from 1e20): stored as 0",
        "s2 has dates without any valid value: these dates are left out",
    ]


def test_dates_are_ordered_by_index_not_as_text(write_pastis):
    src = write_pastis()
    values = (series(12, 10) % 20_000).astype(np.int16)
    np.save(src / f"DATA_S2/S2_{TILE}.npy", values)
    days = {str(i): 20190101 + i for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)}
    (src / "metadata.geojson").write_text(json.dumps(metadata((TILE,), **{"dates-S2": days})))
    tile = read(src)
    assert tile.dates["s2"][:, 1].tolist() == list(range(1, 13))
    np.testing.assert_array_equal(tile.arrays["s2"], values)


def test_radar_nodata_is_nan(write_pastis):
    src = write_pastis()
    values = decibels()
    values[0, 1, 2, 3] = -np.inf
    values[1, 0, 4, 5] = 0
    values[1, 2, 6, 7] = 0  # VV = VH: a measurement
    np.save(src / f"DATA_S1A/S1A_{TILE}.npy", values)
    tile = read(src)
    expected = decibels()
    expected[0, 1:, 2, 3] = np.nan
    expected[1, [0, 2], 4, 5] = np.nan
    expected[1, 2, 6, 7] = 0
    np.testing.assert_array_equal(tile.arrays["s1_asc"], expected)
    assert [n for n in tile.notes if n.startswith("s1_")] == [
        "s1_asc has infinite values: stored as NaN",
        "s1_asc has zeros, which in decibels are no measurement: stored as NaN",
        "s1_des is not in the order of time: sorted",
        "s1_asc has fewer than 4 dates: some are seen twice",
        "s1_des has fewer than 4 dates: some are seen twice",
    ]


NAMES = tuple(str(10_000 + i) for i in range(10))


@pytest.mark.parametrize(
    ("split", "folds"),
    [
        ("train", (1, 2, 3)),
        ("val", (4,)),
        ("test", (5,)),
        ("train_rotation_1", (1, 2, 3)),
        ("train_rotation_2", (2, 3, 4)),
        ("val_rotation_2", (5,)),
        ("test_rotation_2", (1,)),
        ("train_rotation_3", (3, 4, 5)),
        ("test_rotation_3", (2,)),
        ("train_rotation_4", (4, 5, 1)),
        ("val_rotation_4", (2,)),
        ("train_rotation_5", (5, 1, 2)),
        ("val_rotation_5", (3,)),
        ("test_rotation_5", (4,)),
        ("fold_3", (3,)),
    ],
)
def test_splits_are_folds_in_five_rotations(write_pastis, split, folds):
    src = write_pastis((TILE,))
    (src / "metadata.geojson").write_text(json.dumps(metadata(NAMES)))
    for folder, file in (
        ("DATA_S2", "S2_{}.npy"),
        ("DATA_S1A", "S1A_{}.npy"),
        ("DATA_S1D", "S1D_{}.npy"),
        ("ANNOTATIONS", "TARGET_{}.npy"),
        ("DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019", "SPOT6_RVB_1M00_2019_{}.tif"),
    ):
        for name in NAMES:
            (src / folder / file.format(name)).touch()
    keys = datasets.open_raw("pastis_hd", src, split).keys()
    assert keys == [name for i, name in enumerate(NAMES) if i % 5 + 1 in folds]


def test_a_csv_has_precedence_over_the_folds(write_pastis):
    src = write_pastis(NAMES[:3])
    (src / "train.csv").write_text(f"image\n{NAMES[2]}\n{NAMES[1]}\n")
    (src / "train_filtered_10.csv").write_text(f"image\n{NAMES[0]}\n")
    assert datasets.open_raw("pastis_hd", src, "train").keys() == [NAMES[1], NAMES[2]]
    assert datasets.open_raw("pastis_hd", src, "train_filtered_10").keys() == [NAMES[0]]
    assert datasets.open_raw("pastis_hd", src, "fold_1").keys() == [NAMES[0]]


def test_modalities_can_be_chosen_and_the_reader_pickles(write_pastis):
    src = write_pastis()
    for path in (src / "DATA_S1A").iterdir():
        path.unlink()
    (src / "DATA_S1A").rmdir()
    tile = read(src, "train", ("s2", "spot"))
    assert tile.arrays.keys() == tile.dates.keys() == {"s2", "spot"}
    with pytest.raises(DatasetError, match="DATA_S1A: cannot list the folder"):
        read(src)
    with pytest.raises(DatasetError, match="has no modality 'aerial'"):
        read(src, "train", ("aerial",))
    reader = pickle.loads(pickle.dumps(datasets.open_raw("pastis_hd", src, "train", ("s2",))))
    assert reader.read(TILE).key == TILE


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_split_or_column_is_named(write_pastis):
    src = write_pastis()
    with pytest.raises(DatasetError, match=r"no split 'training'; splits: train, val, test, fold_1"):
        datasets.open_raw("pastis_hd", src, "training")
    with pytest.raises(DatasetError, match="split val is empty"):
        datasets.open_raw("pastis_hd", src, "val")
    (src / "val.csv").write_text("name\nx\n")
    with pytest.raises(DatasetError, match="no column 'image' but name"):
        datasets.open_raw("pastis_hd", src, "val")
    (src / "val.csv").write_text("image\n5\n")
    with pytest.raises(DatasetError, match="none of its 1 tiles has its files"):
        datasets.open_raw("pastis_hd", src, "val")
    content = metadata((TILE,))
    del content["features"][0]["properties"]["dates-S1D"]
    (src / "metadata.geojson").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="has no column 'dates-S1D'"):
        datasets.open_raw("pastis_hd", src, "train")
    (src / "metadata.geojson").write_text("{")
    with pytest.raises(DatasetError, match=r"metadata.geojson: cannot be read") as error:
        datasets.open_raw("pastis_hd", src, "train")
    one_line(error)
    (src / "metadata.geojson").unlink()
    with pytest.raises(DatasetError, match=r"metadata.geojson: is missing"):
        datasets.open_raw("pastis_hd", src, "train")


@pytest.mark.parametrize(
    ("days", "message"),
    [
        ({}, "so the tile has no dates"),
        (None, "so the tile has no dates"),
        ("soon", "is not an object of dates"),
        ([20190101, 20190106, 20190111], "is not an object of dates"),
        ({"first": 20190101}, "is not an object of dates"),
        ({"0": 20190101, "1": 20190106}, "has 3 dates, metadata.geojson lists 2"),
        ({"0": 20190101, "1": 20190106, "2": 20190230}, "not in the calendar"),
        ({"0": 20190101, "1": 20190106, "2": "May"}, "entry 2 has 'May'"),
    ],
)
def test_invalid_dates_are_named(write_pastis, days, message):
    src = write_pastis()
    (src / "metadata.geojson").write_text(json.dumps(metadata((TILE,), **{"dates-S2": days})))
    with pytest.raises(DatasetError, match=message) as error:
        read(src)
    assert TILE in one_line(error)


def test_bad_tiles_are_skipped_and_counted_by_kind_or_raise(write_pastis, tmp_path):
    src, out = write_pastis(NAMES[:8]), tmp_path / "shards"
    content = metadata(NAMES[:8], Fold=1)
    content["features"][0]["properties"]["dates-S1A"] = {}
    content["features"].pop(7)
    (src / "metadata.geojson").write_text(json.dumps(content))
    bad = labels()
    bad[0, 5, 5] = 20
    np.save(src / f"ANNOTATIONS/TARGET_{NAMES[1]}.npy", bad)
    np.save(src / f"DATA_S2/S2_{NAMES[2]}.npy", series(3, 10).astype(np.float32))
    (src / f"DATA_S1D/S1D_{NAMES[3]}.npy").write_bytes(b"not an array")
    (src / f"DATA_S2/S2_{NAMES[4]}.npy").unlink()
    np.save(src / f"DATA_S1A/S1A_{NAMES[5]}.npy", decibels()[:1])
    (src / "train.csv").write_text("\n".join(["image", *NAMES[:8]]) + "\n")
    command = ["shard", "pastis_hd", str(src), str(out), "--split", "train", "--workers", "1"]
    stopped = CliRunner().invoke(app, [*command, "--strict"])
    assert isinstance(stopped.exception, DatasetError)
    assert not (out / "manifest.json").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "1 samples in 1 shards" in done.output
    manifest = Manifest.load(str(out))
    assert {k: n for k, n in manifest.notes.items() if k.startswith("left out")} == {
        "left out: no dates": 1,
        "left out: a label outside the list": 1,
        "left out: cannot be read": 2,
        "left out: a file is missing": 1,
        "left out: dates do not fit": 1,
        "left out: no metadata": 1,
    }
    causes = json.loads((out / "train-000000.index.json").read_text(encoding="utf-8"))["left_out"]
    assert "is float32 3×10×128×128, expected int16 T×10×128×128" in causes[NAMES[2]]
    assert f"S1D_{NAMES[3]}.npy: cannot be read" in causes[NAMES[3]]
    assert verify(str(out)) == []


def source_of(src: Path, folder: Path) -> Source:
    url = str(folder / "shards")
    manifest = write_shards(datasets.open_raw("pastis_hd", src, "train"), url, "train")
    store = Store(url, folder / "cache", 10**9)
    return Source(manifest.spec, manifest.shards_of(["train"]), store)


def test_model_inputs_of_crops_have_its_bands_and_scale(write_pastis, tmp_path):
    """Crop 10 of the tile's 64, the third of the second row: rows from 160 m, columns from 320 m."""
    loader = EvalLoader(source_of(write_pastis(), tmp_path), 64)
    assert loader.num_crops == 64
    batch = next(iter(loader))
    assert torch.equal(batch.pixels["spot"][10, 0], torch.from_numpy(spot_pixels()[:, 160:320, 320:480]))
    # Three dates stored, sixteen seen: each repeated where it stands; so are the two of the radar.
    assert batch.dates["s2"][10, :, 0].tolist() == [2018] * 11 + [2020] * 5
    s2 = series(3, 10).astype(np.int16)[[0] * 6 + [1] * 5 + [2] * 5, :, 16:32, 32:48]
    np.testing.assert_array_equal(batch.pixels["s2"][10].numpy(), s2)
    s1 = decibels()[[0, 0, 1, 1], :2, 16:32, 32:48]
    assert len(S1A_DAYS) == 2
    np.testing.assert_array_equal(batch.pixels["s1_asc"][10].numpy(), s1)
    np.testing.assert_array_equal(batch.targets["crop_type"][10].numpy(), labels()[0][16:32, 32:48])
    scales = {s.name: (s.scale.kind, s.scale.divisor) for s in SPEC.sensors}
    s1 = ("linear", 20)
    assert scales == {"spot": ("linear", 255), "s2": ("linear", 10_000), "s1_asc": s1, "s1_des": s1}


def test_shares_are_computed_per_crop(write_pastis, tmp_path):
    batch = next(iter(EvalLoader(source_of(write_pastis(), tmp_path), 64)))
    shares = batch.targets["crops_present"].numpy()
    assert shares.dtype == np.float32
    meadow, sorghum = 0, 17
    assert shares[0].tolist() == [1.0] + [0.0] * 17  # the first two rows of crops are meadow
    assert shares[7, meadow] == 15 / 16  # the last column of the tile is void
    assert shares[16, sorghum] == 1
    assert not shares[32:].any()  # background

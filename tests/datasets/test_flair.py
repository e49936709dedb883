"""The readers of FLAIR-HUB and FLAIR#2 against patches written by hand, and against bad input."""

from __future__ import annotations

import json
import pickle
import shutil
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from testkit import flair_tile as hand
from testkit.flair_tile import NEIGHBOUR, PATCH, path_of, write_dates, write_gpkg, write_tif
from typer.testing import CliRunner

from maestro_scale import datasets
from maestro_scale.cli import app
from maestro_scale.datasets.flair_hub.dates import Dates
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.evaluation.probes.dense import IGNORED
from maestro_scale.evaluation.tasks.task import SegmentationTask
from maestro_scale.model.embed import network_input
from maestro_scale.shards.format.fields import check_tile
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source

EVERYTHING = (
    "aerial",
    "dem",
    "s2",
    "s1_asc",
    "s1_des",
    "spot",
    "aerial_rlt",
    "cosia",
    "lpis_1",
    "lpis_2",
    "lpis_3",
)
BENCHMARKS = ("flair_hub", "flair2")


def read(src: Path, names: tuple[str, ...] | None = None, dataset: str = "flair_hub", split: str = "train"):
    reader = datasets.open_raw(dataset, src, split, names)
    tile = reader.read(PATCH)
    check_tile(tile, reader.spec)
    return tile


def test_pixels_masks_and_dates_equal_the_files_in_chronological_order(write_flair):
    tile = read(write_flair(), EVERYTHING)
    np.testing.assert_array_equal(tile.arrays["aerial"], hand.aerial()[None])
    np.testing.assert_array_equal(tile.arrays["dem"], hand.dem()[None])
    np.testing.assert_array_equal(tile.arrays["spot"], hand.spot()[None])
    np.testing.assert_array_equal(tile.arrays["aerial_rlt"], hand.panchromatic()[None])
    np.testing.assert_array_equal(tile.arrays["s2"], hand.stack(3, 10)[[1, 0, 2]])
    np.testing.assert_array_equal(tile.masks["s2"], hand.snow_cloud()[[1, 0, 2]])
    assert tile.masks["s2"][1, 0, 1, 2] == 7
    assert tile.dates["aerial"].tolist() == tile.dates["dem"].tolist() == [[2019, 185, 0]]
    assert tile.ref_date.tolist() == [2019, 185, 0]
    assert tile.dates["spot"].tolist() == [[2019, 224, 0]]
    assert tile.dates["aerial_rlt"].tolist() == [[1955, 163, 0]]
    assert tile.dates["s2"].tolist() == [[2019, 7, 0], [2019, 60, 0], [2019, 365, 0]]
    # Dates are numbered, not listed: number 1 is of the first bands.
    assert tile.dates["s1_asc"].tolist() == tile.dates["s1_des"].tolist() == [[2019, 3, 0], [2019, 183, 0]]


def test_radar_stays_linear_with_nodata_as_nan(write_flair):
    tile = read(write_flair())
    expected = hand.power()
    expected[1, 0, 0, 0] = np.nan
    for orbit in ("s1_asc", "s1_des"):
        np.testing.assert_array_equal(tile.arrays[orbit], expected)
        assert f"{orbit} has NaN: filled in from other dates when read" in tile.notes
        assert f"{orbit} has zeros, which in linear power are no measurement: stored as NaN" in tile.notes
        assert f"{orbit} has fewer than 4 dates: some are seen twice" in tile.notes
    assert "s2 has fewer than 16 dates: some are seen twice" in tile.notes


def test_dates_belong_to_the_patch_not_to_its_zone(write_flair):
    src = write_flair((PATCH, NEIGHBOUR))
    other = '{"1": 20190401, "2": 20190501, "3": 20190601}'
    write_dates(src, "SENTINEL2", {NEIGHBOUR: other, PATCH: hand.S2_DATES}, "acquisition_dates")
    reader = datasets.open_raw("flair_hub", src, "train")
    assert reader.read(PATCH).dates["s2"][:, 1].tolist() == [7, 60, 365]
    assert reader.read(NEIGHBOUR).dates["s2"][:, 1].tolist() == [91, 121, 152]
    assert reader.read(PATCH).ref_date.tolist() == [2019, 185, 0]
    assert reader.read(NEIGHBOUR).ref_date.tolist() == [2019, 186, 0]


def batch_of(dataset: str, src: Path, tmp_path: Path, names: tuple[str, ...] | None = None):
    """The manifest's spec and the only tile as evaluation sees it, after a way through shards."""
    url = str(tmp_path / f"shards-{dataset}")
    manifest = write_shards(datasets.open_raw(dataset, src, "train", names), url, "train")
    spec = manifest.spec
    source = Source(
        spec,
        manifest.shards_of(["train"]),
        Store(url, tmp_path / "c", 10**9),
        spec.targets,
    )
    return spec, next(iter(EvalLoader(source, 1)))


def test_model_inputs_have_bands_scales_and_dates_of_the_paper(write_flair, tmp_path):
    spec, batch = batch_of("flair_hub", write_flair(), tmp_path, EVERYTHING)
    seen = {s.name: network_input(s, batch.pixels[s.name])[0] for s in spec.sensors}
    red, green, blue, infrared = torch.from_numpy(hand.aerial()).float() / 255
    torch.testing.assert_close(seen["aerial"][0], torch.stack([infrared, red, green, blue]))
    # 8 m above the ground: 30 * 8 / 1000; the surface is at 100 + 8 m in the first row.
    torch.testing.assert_close(seen["dem"][0, 1], torch.full((512, 512), 0.24), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen["dem"][0, 0, 0], torch.full((512,), 0.108))
    assert batch.dates["s2"][0, :, 1].tolist() == [7] * 6 + [60] * 5 + [365] * 5
    # In January, the second date of the file: (3,000 + 200 band + 10 row + column) / 5,000.
    assert seen["s2"][0, 9, 4, 5].item() == pytest.approx((3_000 + 1_800 + 45) / 5_000)
    assert batch.dates["s1_asc"][0, :, 1].tolist() == [3, 3, 183, 183]
    # Band VH at row 4, column 5 of date 0: ln(0.0246) / 5; the zero is filled in from the other date.
    assert seen["s1_asc"][0, 1, 4, 5].item() == pytest.approx(np.log(246 / 10_000) / 5)
    assert seen["s1_asc"][2, 0, 0, 0].item() == pytest.approx(np.log(1 / 10_000) / 5)
    assert seen["spot"].shape == (1, 3, 128, 128)
    assert seen["spot"][0, 2, 127, 127].item() == pytest.approx((2_000 + 630 + 63) / 1_000)
    assert seen["aerial_rlt"][0, 0, :, 0].mul(255).round().tolist() == list(range(256))


# COSIA's values in order; None counts nowhere.
COUNTED = {
    "flair_hub": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, None, None, None, None],
    "flair2": [0, None, None, 1, 2, 3, 4, None, 5, 6, 7, 8, 9, 10, 11, None, None, None, None],
}
NAMES = {
    "flair_hub": "building greenhouse swimming-pool impervious-surface pervious-surface bare-soil water snow "
    "herbaceous-vegetation agricultural-land plowed-land vineyard deciduous coniferous brushwood",
    "flair2": "building impervious-surface pervious-surface bare-soil water herbaceous-vegetation "
    "agricultural-land plowed-land vineyard deciduous coniferous brushwood",
}


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_ignored_labels_are_left_out_of_loss_and_metrics(dataset, write_flair, tmp_path):
    spec, batch = batch_of(dataset, write_flair(), tmp_path)
    task = SegmentationTask(spec.target("cosia"), SimpleNamespace(crop_pixels=512))
    assert [c.replace(" ", "-") for c in task.classes] == NAMES[dataset].split()
    expected = [IGNORED if value is None else value for value in COUNTED[dataset]]
    stripes = np.repeat(expected, 27)[:512]
    np.testing.assert_array_equal(task.labels(batch)[0], np.broadcast_to(stripes, (512, 512)))


def test_flair2_uses_its_own_list_without_radar(write_flair):
    src = write_flair((PATCH, NEIGHBOUR))
    (src / "train_flair2.csv").write_text(f"patch_id\n{PATCH}\n")
    shutil.rmtree(src / "D012-2019_SENTINEL1-ASC_TS")
    reader = datasets.open_raw("flair2", src, "train")
    assert reader.keys() == [PATCH]
    assert set(reader.read(PATCH).arrays) == {"aerial", "dem", "s2"}
    assert "s1_des" in read(src, ("aerial", "s1_des"), "flair2").arrays


def test_crop_labels_have_three_levels_if_selected(write_flair):
    src = write_flair()
    assert set(read(src).targets) == {"cosia"}
    tile = read(src, ("s2", "lpis_1", "lpis_3"))
    assert set(tile.arrays) == {"s2"}
    assert set(tile.targets) == {"lpis_1", "lpis_3"}
    assert tile.targets["lpis_1"][0].tolist() == [1] * 512
    assert (tile.targets["lpis_1"][1:] == 22).all()
    assert tile.targets["lpis_3"][0].tolist() == [3] * 512
    classes = {
        t.name: t.classes for t in datasets.open_raw("flair_hub", src, "train", EVERYTHING).spec.targets
    }
    assert [len(classes[f"lpis_{i}"]) for i in (1, 2, 3)] == [23, 31, 46]
    assert [classes[f"lpis_{i}"][i] for i in (1, 2, 3)] == ["wheat", "barley", "spring wheat"]
    assert [classes[f"lpis_{i}"][-1] for i in (1, 2, 3)] == ["background"] * 3
    with pytest.raises(DatasetError, match="has no modality 'landsat'"):
        read(src, ("s2", "landsat"))


def write_splits(src: Path) -> None:
    columns = {f"split_{i}": ["train", "valid", "test"] for i in (1, 2)}
    columns["split_2"] = ["test", "train", "valid"]
    columns["split_flairchallenge"] = [None, "train", "test"]
    write_gpkg(
        src / "GLOBAL_ALL_MTD/GLOBAL_ALL_MTD_SPLIT.gpkg", {"patch_id": [PATCH, NEIGHBOUR, "a_b_c"], **columns}
    )


def test_splits_of_the_metadata_have_names(write_flair):
    src = write_flair((PATCH, NEIGHBOUR))
    write_splits(src)

    def keys(dataset: str, split: str) -> list[str]:
        return datasets.open_raw(dataset, src, split, ("aerial", "cosia")).keys()

    assert keys("flair_hub", "train") == [PATCH, NEIGHBOUR]  # the CSV goes first
    assert keys("flair_hub", "val") == [NEIGHBOUR]
    assert keys("flair_hub", "split_1_train") == [PATCH]
    assert keys("flair_hub", "split_2_train") == [NEIGHBOUR]
    assert keys("flair_hub", "split_2_test") == [PATCH]
    assert keys("flair_hub", "split_flairchallenge_train") == [NEIGHBOUR]
    (src / "train_flair2.csv").unlink()
    reader = datasets.open_raw("flair2", src, "train")
    assert reader.keys() == [NEIGHBOUR]
    assert any("split_flairchallenge of the metadata is taken" in n for n in reader.read(NEIGHBOUR).notes)
    (src / "train_filtered_10.csv").write_text(f"patch_id\n{PATCH}\n")
    assert keys("flair_hub", "train_filtered_10") == [PATCH]
    with pytest.raises(DatasetError, match=r"splits found: train, .*split_2_train, split_2_val"):
        keys("flair_hub", "split_9_train")


def test_the_reader_pickles_small(write_flair):
    reader = datasets.open_raw("flair_hub", write_flair(), "train", EVERYTHING)
    assert pickle.loads(pickle.dumps(reader)).read(PATCH).key == PATCH
    with pytest.raises(KeyError):
        reader.read(NEIGHBOUR)


# ---- bad input


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["flair_aerial_train", "flair_sen_test", "flair-2_centroids_sp_to_patch.json", "D012_2019"]
)
def test_the_original_release_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match="is an original release of FLAIR#1 or FLAIR#2") as error:
        datasets.open_raw("flair2", tmp_path, "train")
    assert "fetch IGNF/FLAIR-HUB" in one_line(error)


def test_missing_folders_lists_and_columns_are_named(write_flair, tmp_path):
    src = write_flair()
    with pytest.raises(DatasetError, match="cannot list the folder"):
        datasets.open_raw("flair_hub", tmp_path / "nowhere", "train")
    (src / "test.csv").write_text("image\nx\n")
    with pytest.raises(DatasetError, match="no column 'patch_id' but image"):
        datasets.open_raw("flair_hub", src, "test")
    (src / "val.csv").write_text(f"patch_id\n{PATCH}\n{PATCH}\n")
    with pytest.raises(DatasetError, match="names 1 tiles twice"):
        datasets.open_raw("flair_hub", src, "val")
    shutil.rmtree(src / "D012-2019_DEM_ELEV")
    with pytest.raises(DatasetError, match=r"has no folder of DEM_ELEV for any domain of train.csv") as error:
        datasets.open_raw("flair_hub", src, "train")
    one_line(error)
    assert set(read(src, ("aerial", "s2")).arrays) == {"aerial", "s2"}
    mtd = src / "GLOBAL_ALL_MTD"
    write_gpkg(mtd / "GLOBAL_SENTINEL2_MTD_DATES.gpkg", {"patch_id": [PATCH], "when": ["20190101"]})
    with pytest.raises(
        DatasetError, match="neither column 'acquisition_dates' nor 'date' but patch_id, when"
    ):
        read(src, ("aerial", "s2"))
    (mtd / "GLOBAL_SENTINEL2_MTD_DATES.gpkg").write_bytes(b"no GeoPackage")
    with pytest.raises(DatasetError, match=r"SENTINEL2_MTD_DATES.gpkg: cannot be read") as error:
        read(src, ("aerial", "s2"))
    one_line(error)
    (mtd / "GLOBAL_AERIAL_MTD_DATES.gpkg").unlink()
    with pytest.raises(DatasetError, match=r"GLOBAL_AERIAL_MTD_DATES.gpkg: is missing"):
        read(src, ("aerial",))


@pytest.mark.parametrize(
    ("dates", "kind", "message"),
    [
        (None, "no dates", f"has no dates for {PATCH}"),
        ("{}", "no dates", f"lists no date for {PATCH}"),
        (
            '{"1": 20190103, "2": 20190230, "3": 20190401}',
            "dates do not fit",
            "20190230, which is not in the calendar",
        ),
        ("soon", "dates do not fit", "has 'soon' where dates are expected"),
        ('{"1": null}', "dates do not fit", "where dates are expected"),
        ('{"1": 20190103, "2": 20190202}', "dates do not fit", "has 3 dates, the metadata lists 2"),
    ],
)
def test_invalid_dates_are_named(write_flair, dates, kind, message):
    src = write_flair()
    write_dates(src, "SENTINEL2", {PATCH: dates}, "acquisition_dates")
    with pytest.raises(DatasetError, match=message) as error:
        read(src)
    assert error.value.kind == kind
    one_line(error)


def test_metadata_columns_of_another_type_are_named(write_flair):
    src = write_flair()
    path = src / "GLOBAL_ALL_MTD" / "GLOBAL_SENTINEL2_MTD_DATES.gpkg"
    write_gpkg(path, {"patch_id": [PATCH], "acquisition_dates": [b"\xff\xfe"]})
    with pytest.raises(DatasetError, match=r"GLOBAL_SENTINEL2_MTD_DATES\.gpkg") as error:
        read(src)
    one_line(error)
    (src / "train.csv").unlink()
    write_gpkg(
        src / "GLOBAL_ALL_MTD" / "GLOBAL_ALL_MTD_SPLIT.gpkg", {"patch_id": [PATCH], "split_1": [b"\x01"]}
    )
    with pytest.raises(DatasetError, match=r"GLOBAL_ALL_MTD_SPLIT\.gpkg") as error:
        read(src)
    one_line(error)


def test_dates_in_other_notations_are_read(write_flair):
    src = write_flair()
    write_dates(src, "AERIAL", {PATCH: "2019-07-04"}, "date")
    write_dates(src, "AERIAL-RLT", {PATCH: "1955"}, "date")
    write_dates(src, "SENTINEL1-ASC", {PATCH: '["20190103", "20190702"]'}, "acquisition_dates")
    tile = read(src, EVERYTHING)
    assert tile.ref_date.tolist() == [2019, 185, 0]
    assert tile.dates["aerial_rlt"].tolist() == [[1955, 182, 0]]
    assert "GLOBAL_AERIAL-RLT_MTD_DATES has a year alone: the first of July is taken" in tile.notes
    assert tile.dates["s1_asc"].tolist() == [[2019, 3, 0], [2019, 183, 0]]


def test_invalid_values_are_corrected_and_noted(write_flair):
    src = write_flair()
    s2 = hand.stack(3, 10).astype(np.float32).reshape(30, 10, 10)
    s2[0, 0, :3] = (12.4, 70_000, np.nan)
    write_tif(path_of(src, "D012-2019_SENTINEL2_TS"), s2)
    mask = hand.snow_cloud().reshape(6, 10, 10).astype(np.float32)
    mask[0, 5, :2] = (0.2, np.nan)
    write_tif(path_of(src, "D012-2019_SENTINEL2_MSK-SC"), mask)
    dem = hand.dem()
    dem[0, 0, 0], dem[1, 0, 1] = np.nan, -9999
    write_tif(path_of(src, "D012-2019_DEM_ELEV"), dem)
    tile = read(src)
    assert tile.arrays["s2"][1, 0, 0, :3].tolist() == [12, 65_535, 0]
    assert tile.masks["s2"][1, 1, 0, :3].tolist() == [0, 0, 100]
    assert tile.masks["s2"][1, 0, 5, :2].tolist() == [1, 100]
    assert np.isfinite(tile.arrays["dem"]).all()
    assert tile.arrays["dem"][0, 1, 0, 1] == pytest.approx(104, abs=0.1)
    for start in ("s2 has NaN", "s2 has values that", "dem has pixels without elevation"):
        assert [n for n in tile.notes if n.startswith(start)], start


def test_declared_nodata_is_marked_filled_or_ignored(write_flair):
    src = write_flair()
    s2 = hand.stack(3, 10).astype(np.uint16).reshape(30, 10, 10)
    s2[1, 4, 5] = 65_535  # date 0 of the file, B3
    write_tif(path_of(src, "D012-2019_SENTINEL2_TS"), s2, nodata=65_535)
    mask = hand.snow_cloud().reshape(6, 10, 10)
    mask[0, 0, 0] = 255
    write_tif(path_of(src, "D012-2019_SENTINEL2_MSK-SC"), mask, nodata=255)
    dem = hand.dem()
    dem[0, 0, 0] = 1234
    write_tif(path_of(src, "D012-2019_DEM_ELEV"), dem, nodata=1234)
    s1 = hand.power().reshape(4, 10, 10)
    s1[3, 9, 9] = 55
    write_tif(path_of(src, "D012-2019_SENTINEL1-ASC_TS"), s1, nodata=55)
    label = hand.cosia().copy()
    label[0, 7, 7] = 255
    write_tif(path_of(src, "D012-2019_AERIAL_LABEL-COSIA"), label, nodata=255)
    tile = read(src)
    assert tile.arrays["s2"][1, 1, 4, 5] == 0
    expected = hand.snow_cloud()[[1, 0, 2]]
    expected[1, 1, 4, 5], expected[1, 0, 0, 0] = 100, 100
    np.testing.assert_array_equal(tile.masks["s2"], expected)
    assert tile.arrays["dem"][0, 0, 0, 0] == pytest.approx(hand.dem()[0].mean(), abs=0.1)
    assert np.isnan(tile.arrays["s1_asc"][1, 1, 9, 9])
    expected = hand.cosia()[0].copy()
    expected[7, 7] = 15  # the first of the ignored classes
    np.testing.assert_array_equal(tile.targets["cosia"], expected)
    assert [n for n in tile.notes if "declares" in n or "percent" in n] == [
        "dem has values that the file declares as nodata: filled in with the band's mean",
        "the mask of s2 has values outside 0 to 100 percent or NaN: taken as marked",
        "s2 has values that the file declares as nodata: stored as 0 and marked as cloud",
        "s1_asc has values that the file declares as nodata: stored as NaN",
        "cosia has pixels that the file declares as nodata: stored as ignored",
    ]


def test_label_pixels_without_a_class_leave_the_tile_out(write_flair):
    src = write_flair()
    path = path_of(src, "D012-2019_ALL_LABEL-LPIS")
    write_tif(path, hand.lpis(), nodata=22)  # a class of the third level: a label in spite of the tag
    np.testing.assert_array_equal(read(src, ("aerial", "lpis_1")).targets["lpis_1"], hand.lpis()[0])
    label = hand.lpis().copy()
    label[0, 3, 3] = 255
    write_tif(path, label, nodata=255)
    with pytest.raises(DatasetError, match="lpis_1 has no ignored class") as error:
        read(src, ("aerial", "lpis_1"))
    assert error.value.kind == "pixels without a label"


@pytest.mark.parametrize("key", ["D012-2019_.._5-10", "D012-2019_/etc_5-10", "a_b", "a_b_c_d", "../x_y_z"])
def test_a_patch_id_is_not_a_path(write_flair, key):
    src = write_flair()
    (src / "train.csv").write_text(f"patch_id\n{PATCH}\n{key}\n")
    reader = datasets.open_raw("flair_hub", src, "train", ("aerial",))
    assert reader.read(PATCH).key == PATCH
    with pytest.raises(DatasetError) as error:
        reader.read(key)
    assert "not a patch id" in error.value.kind or "missing" in error.value.kind


def test_bad_tiles_are_skipped_and_counted_by_kind_or_raise(write_flair, tmp_path):
    zone = tuple(f"D012-2019_AF-S1-27_0-{i}" for i in range(8))
    elsewhere = "D033-2021_UU-S2-12_0-0"
    src, out = write_flair(zone), tmp_path / "shards"
    (src / "train.csv").write_text("\n".join(["patch_id", *zone, elsewhere, "D012-2019_AF-S1-27_9-9"]) + "\n")
    path_of(src, "D012-2019_DEM_ELEV", zone[0]).unlink()
    path_of(src, "D012-2019_AERIAL_RGBI", zone[1]).write_bytes(b"not an image")
    label = hand.cosia().copy()
    label[0, 3, 3] = 19
    write_tif(path_of(src, "D012-2019_AERIAL_LABEL-COSIA", zone[2]), label)
    dates = dict.fromkeys(zone, hand.S2_DATES)
    write_dates(src, "SENTINEL2", dates | {zone[3]: "{}", zone[4]: '{"1": 20190103}'}, "acquisition_dates")
    command = ["shard", "flair_hub", str(src), str(out), "--split", "train", "--workers", "1"]
    stopped = CliRunner().invoke(app, [*command, "--strict"])
    assert isinstance(stopped.exception, DatasetError)
    assert not (out / "manifest.json").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    manifest = Manifest.load(str(out))
    left_out = {
        k.removeprefix("left out: "): n for k, n in manifest.notes.items() if k.startswith("left out")
    }
    assert left_out == {
        "a file is missing": 2,
        "a modality folder is missing": 1,
        "a label outside the list": 1,
        "cannot be read": 1,
        "no dates": 1,
        "dates do not fit": 1,
    }
    assert sum(s.samples for s in manifest.shards) == 3
    assert (
        "band 1 holds 19, cosia has values 0 to 18" in manifest.examples["left out: a label outside the list"]
    )
    assert "D033-2021_AERIAL_RGBI: is missing" in manifest.examples["left out: a modality folder is missing"]
    assert "1 tiles: left out: no dates (first: " in done.output
    assert verify(str(out)) == []


def test_tiles_of_a_domain_without_a_folder_of_an_optional_product_are_stored_without_it(
    write_flair, tmp_path
):
    elsewhere = "D033-2021_UU-S2-12_0-0"
    src = write_flair()
    for folder, bands in hand.files().items():
        if "SENTINEL1-ASC" not in folder:
            write_tif(path_of(src, folder.replace("D012-2019", "D033-2021"), elsewhere), bands)
    for sensor, when in (("SENTINEL2", hand.S2_DATES), ("SENTINEL1-DESC", hand.S1_DATES)):
        write_dates(src, sensor, dict.fromkeys((PATCH, elsewhere), when), "acquisition_dates")
    write_dates(src, "AERIAL", dict.fromkeys((PATCH, elsewhere), "20190704"), "date")
    (src / "train.csv").write_text(f"patch_id\n{PATCH}\n{elsewhere}\n")
    reader = datasets.open_raw("flair_hub", src, "train")
    assert [reader.absent(key) for key in (PATCH, elsewhere)] == [(), ("s1_asc",)]
    manifest = write_shards(reader, str(tmp_path / "shards"), "train")
    assert [(s.samples, s.absent) for s in manifest.shards] == [(1, ()), (1, ("s1_asc",))]
    assert (manifest.notes["lacks s1_asc"], manifest.examples["lacks s1_asc"]) == (1, elsewhere)
    assert verify(str(tmp_path / "shards")) == []
    # A product that no domain has is another mistake, and one that is not optional still counts as missing.
    shutil.rmtree(src / "D012-2019_SENTINEL1-ASC_TS")
    with pytest.raises(DatasetError, match="has no folder of SENTINEL1-ASC_TS for any domain"):
        datasets.open_raw("flair_hub", src, "train")


def test_long_series_equal_their_json(tmp_path):
    """A quick way reads what is written as usual, another what is not; both must agree with plain JSON."""
    days = [20190101 + 100 * month + day for month in range(12) for day in range(10)]
    patches = ["a_b_0", "a_b_1", "a_b_2", "a_b_3"]
    numbered = {str(i): day for i, day in enumerate(days, start=1)}
    backwards = dict(reversed(numbered.items()))
    texts = [
        json.dumps(numbered),
        json.dumps(backwards),
        json.dumps(numbered, indent=1),
        json.dumps(days[:99]),
    ]
    write_dates(tmp_path, "SENTINEL2", dict(zip(patches, texts, strict=True)), "acquisition_dates")
    dates = Dates.load(tmp_path, "SENTINEL2", patches)
    expected = [[2019, date(2019, d // 100 % 100, d % 100).timetuple().tm_yday, 0] for d in days]
    for patch, count in zip(patches, (120, 120, 120, 99), strict=True):
        assert dates.of(patch, []).tolist() == expected[:count], patch

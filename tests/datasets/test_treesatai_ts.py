"""The reader of TreeSatAI-TS against a tile written by hand, against bad input, and against the real tile."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from testkit.treesatai_tile import S1_PRODUCTS, S2_PRODUCTS, TILE, aerial_pixels, h5_content, write_csv

from maestro_scale.datasets import open_raw
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.datasets.treesatai_ts.reader import SPEC, _mixes_polarisations
from maestro_scale.datasets.treesatai_ts.splits import GENERA
from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.format.fields import check_tile
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import write_shards

REAL = Path(
    os.environ.get("MAESTRO_TREESATAI_DIR", Path(__file__).parents[2] / "../shared/data/treesatai_ts")
)


RADAR_NOTES = tuple(
    f"{orbit} has {what}"
    for orbit in ("s1_asc", "s1_des")
    for what in (
        "NaN: filled in from other dates when read",
        "zeros, which in linear power are no measurement: stored as NaN",
    )
)  # of the NaN and the zero in testkit.treesatai_tile.h5_content


def read(src: Path, split: str = "train"):
    reader = open_raw("treesatai_ts", src, split)
    (key,) = reader.keys()
    return reader.read(key)


def test_pixels_bands_and_dates_equal_the_files(write_tile):
    tile = read(write_tile())
    assert tile.key == TILE
    np.testing.assert_array_equal(tile.arrays["aerial"], aerial_pixels()[None, :, 2:302, 2:302])
    s2 = tile.arrays["s2"]
    assert s2.dtype == np.int16
    assert s2[2, 7, 4, 5] == 2745
    s1 = tile.arrays["s1_asc"]
    assert np.isnan(s1[0, 1, 2, 3])
    assert np.isnan(s1[1, 0, 0, 0])  # 0 in linear power: outside of the swath
    assert np.isnan(s1).sum() == 3  # the zero of the formula at date 0, row 0, column 0, too
    np.testing.assert_array_equal(tile.arrays["s1_des"], s1 * 2)
    assert tile.dates["s2"].tolist() == [[2020, 60, 0], [2020, 366, 0], [2021, 1, 0]]
    assert tile.dates["s1_asc"].tolist() == [[2020, 3, 0], [2020, 3, 0]]
    assert tile.ref_date.tolist() == [2020, 186, 0]
    assert tile.dates["aerial"].tolist() == [[2020, 186, 0]]
    assert tile.notes == RADAR_NOTES


def test_masks_are_snow_then_cloud_in_percent(write_tile):
    mask = read(write_tile()).masks["s2"]
    assert mask.dtype == np.uint8
    assert mask.shape == (3, 2, 6, 6)
    assert (mask[1, 0, 5, 0], mask[2, 1, 0, 5], int(mask.astype(int).sum())) == (40, 100, 140)


def test_shares_follow_the_names_of_the_columns(write_tile):
    shares = read(write_tile()).targets["species"]
    assert shares.dtype == np.float32
    assert {GENERA[i]: float(shares[i]) for i in np.flatnonzero(shares)} == {"Fagus": 0.75, "Picea": 0.125}


def test_modalities_can_be_selected(write_tile):
    reader = open_raw("treesatai_ts", write_tile(), "train", ["s1_des", "s2"])
    tile = reader.read(TILE)
    assert [s.name for s in reader.spec.sensors] == ["s2", "s1_des"]
    assert tile.arrays.keys() == tile.dates.keys() == {"s2", "s1_des"}
    check_tile(tile, reader.spec)
    with pytest.raises(DatasetError, match="has no modality 'spot'; there are: aerial, s2, s1_asc, s1_des"):
        open_raw("treesatai_ts", write_tile(), "train", ["spot"])


def test_a_tile_that_lacks_an_orbit_is_stored_without_it(write_tile, tmp_path):
    content = h5_content()
    del content["sen-1-des-data"], content["sen-1-des-products"]
    reader = open_raw("treesatai_ts", write_tile(content), "train")
    tile = reader.read(TILE)
    assert tile.arrays.keys() == tile.dates.keys() == {"aerial", "s2", "s1_asc"}
    assert reader.absent(TILE) == ("s1_des",)
    check_tile(tile, reader.spec)
    manifest = write_shards(reader, str(tmp_path / "shards"), "train")
    assert [s.absent for s in manifest.shards] == [("s1_des",)]
    assert manifest.notes["lacks s1_des"] == 1
    assert verify(str(tmp_path / "shards")) == []
    empty = h5_content()
    empty["sen-1-asc-data"], empty["sen-1-asc-products"] = content["sen-1-asc-data"][:0], []
    assert open_raw("treesatai_ts", write_tile(empty), "train").absent(TILE) == ("s1_asc",)
    # Values without their dates, or another sensor, are an error as before.
    del content["sen-1-asc-products"]
    with pytest.raises(DatasetError, match="has no dataset 'sen-1-asc-products'"):
        open_raw("treesatai_ts", write_tile(content), "train").read(TILE)
    content = h5_content()
    del content["sen-2-data"]
    with pytest.raises(DatasetError, match="has no dataset 'sen-2-data'"):
        open_raw("treesatai_ts", write_tile(content), "train").read(TILE)


def test_only_files_of_the_selected_modalities_are_required(write_tile):
    content = h5_content()
    del content["sen-1-des-data"], content["sen-1-des-products"]
    src = write_tile(content)
    tile = open_raw("treesatai_ts", src, "train", ["aerial", "s2", "s1_asc"]).read(TILE)
    assert tile.arrays.keys() == {"aerial", "s2", "s1_asc"}
    shutil.rmtree(src / "aerial")
    tile = open_raw("treesatai_ts", src, "train", ["s1_asc"]).read(TILE)
    assert tile.masks == {}
    assert tile.ref_date.tolist() == [2020, 186, 0]
    with pytest.raises(DatasetError, match="aerial: cannot list the folder"):
        open_raw("treesatai_ts", src, "train")
    shutil.rmtree(src / "sentinel-ts")
    with pytest.raises(DatasetError, match="sentinel-ts: cannot list the folder"):
        open_raw("treesatai_ts", src, "train", ["s2"])
    src = write_tile()
    shutil.rmtree(src / "sentinel-ts")
    tile = open_raw("treesatai_ts", src, "train", ["aerial"]).read(TILE)
    assert tile.dates["aerial"].tolist() == [[2020, 186, 0]]
    # Without a date in the list and a year in the h5 name, the dates of Sentinel-2 are needed.
    text = (src / "train.csv").read_text().replace("20200704", "").replace("_2020.h5", ".h5")
    (src / "train.csv").write_text(text)
    with pytest.raises(DatasetError, match=r"none of its 1 tiles has its files .*, first sentinel-ts/"):
        open_raw("treesatai_ts", src, "train", ["aerial"])
    content = h5_content()
    del content["sen-2-masks"]
    src = write_tile(content, sen_name=f"{TILE}.h5")
    (src / "train.csv").write_text(text)
    tile = open_raw("treesatai_ts", src, "train", ["aerial"]).read(TILE)
    assert tile.ref_date.tolist() == [2020, 183, 0]
    assert len(tile.notes) == 1


def test_invalid_radar_values_are_nan_and_noted(write_tile):
    content = h5_content()
    content["sen-1-asc-data"][1, 1, 5, 3:6] = np.inf, -1, 3.4028235e38
    tile = read(write_tile(content))
    assert np.isnan(tile.arrays["s1_asc"][1, 1, 5, 3:6]).all()
    assert np.isnan(tile.arrays["s1_asc"]).sum() == 3 + 3
    assert "s1_asc has infinite values: stored as NaN" in tile.notes
    assert "s1_asc has fill values (negative or above 1e6): stored as NaN" in tile.notes


def test_a_series_out_of_order_is_sorted_with_its_mask(write_tile):
    content, order = h5_content(), [2, 0, 1]
    for name in ("sen-2-data", "sen-2-masks", "sen-2-products"):
        content[name] = content[name][order]
    tile = read(write_tile(content))
    assert tile.dates["s2"].tolist() == [[2020, 60, 0], [2020, 366, 0], [2021, 1, 0]]
    assert tile.arrays["s2"][2, 7, 4, 5] == 2745
    assert (tile.masks["s2"][1, 0, 5, 0], tile.masks["s2"][2, 1, 0, 5]) == (40, 100)
    assert "s2 is not in the order of time: sorted" in tile.notes


def test_masks_outside_of_0_to_100_are_marked(write_tile):
    content = h5_content()
    content["sen-2-masks"][0, 0, 0, :3] = -9999, 255, np.nan
    tile = read(write_tile(content))
    assert tile.masks["s2"][0, 0, 0].tolist() == [100, 100, 100, 0, 0, 0]
    assert "sen-2-masks has values outside 0 to 100 percent or NaN: taken as marked" in tile.notes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sen-2-products", np.array([[p] for p in S2_PRODUCTS])),
        ("sen-2-products", np.arange(3)),
        ("sen-1-asc-data", np.array([b"text"])),
        ("sen-2-masks", np.zeros(3)),
        ("sen-2-data", np.ones((2, 10, 6, 6))),
    ],
)
def test_malformed_h5_content_leaves_the_tile_out(write_tile, tmp_path, name, value):
    content = h5_content()
    content[name] = value
    src = write_tile(content)
    with pytest.raises(DatasetError, match=f"{TILE}_2020.h5") as error:
        read(src)
    assert name in one_line(error)
    with pytest.raises(WriteError, match="none of its tiles can be read"):
        write_shards(open_raw("treesatai_ts", src, "train"), str(tmp_path / "out"), "train", strict=False)


@pytest.mark.parametrize(
    "labels", [[], 3, {f"{TILE}.tif": 3}, {f"{TILE}.tif": [["Fagus"]]}, {f"{TILE}.tif": [["Fagus", "1"]]}]
)
def test_malformed_json_labels_are_named(write_tile, labels):
    src = write_tile()
    (src / "train.csv").unlink()
    (src / "split").mkdir()
    (src / "split" / "train_filenames.lst").write_text(f"{TILE}.tif\n")
    (src / "labels").mkdir()
    (src / "labels" / "TreeSatBA_v9_60m_multi_labels.json").write_text(json.dumps(labels))
    with pytest.raises(DatasetError, match=r"TreeSatBA_v9_60m_multi_labels\.json") as error:
        read(src)
    one_line(error)


def test_arrays_fit_the_spec_and_the_reader_pickles(write_tile):
    reader = pickle.loads(pickle.dumps(open_raw("treesatai_ts", write_tile(), "train")))
    tile = reader.read(TILE)
    for m in SPEC.modalities:
        array = tile.arrays[m.name]
        assert array.shape[1:] == (len(m.bands), m.size, m.size)
        assert array.dtype == m.dtype
        assert array.flags.c_contiguous
        assert tile.dates[m.name].shape == (len(array), 3)
        assert tile.dates[m.name].dtype == np.int16


def test_lists_and_json_labels_are_read_and_the_assumed_date_is_noted(write_tile):
    src = write_tile()
    (src / "train.csv").unlink()
    (src / "split").mkdir()
    (src / "split" / "train_filenames.lst").write_text(f"{TILE}.tif\n")
    (src / "labels").mkdir()
    labels = {f"{TILE}.tif": [["Picea", 0.125], ["Fagus", 0.75]]}
    (src / "labels" / "TreeSatBA_v9_60m_multi_labels.json").write_text(json.dumps(labels))
    tile = read(src)
    assert tile.targets["species"][GENERA.index("Fagus")] == 0.75
    assert tile.targets["species"][GENERA.index("Picea")] == 0.125
    assert tile.ref_date.tolist() == [2020, 183, 0]
    assumed = "aerial date not given: the first of July of the year in the h5 name is taken"
    assert tile.notes == (*RADAR_NOTES, assumed)


def test_a_filtered_split_is_a_split(write_tile):
    src = write_tile()
    (src / "train.csv").rename(src / "train_filtered_10.csv")
    assert read(src, "train_filtered_10").key == TILE


def test_ten_mask_channels_are_cut_to_two_and_noted(write_tile):
    content = h5_content()
    content["sen-2-masks"] = np.concatenate([content["sen-2-masks"], np.full((3, 8, 6, 6), 7, np.float32)], 1)
    tile = read(write_tile(content))
    assert int(tile.masks["s2"].astype(int).sum()) == 140
    channels = "sen-2-masks has 10 channels: the first two are taken as snow and cloud"
    assert tile.notes == (channels, *RADAR_NOTES)


def test_an_h5_name_without_year_is_found_and_noted(write_tile):
    tile = read(write_tile(sen_name=f"{TILE}.h5"))
    assert tile.notes == (
        "the h5 name in the split and the one on disk differ in the year: taken as the same",
        *RADAR_NOTES,
    )


def test_a_file_of_another_year_does_not_replace_the_listed_one(write_tile):
    with pytest.raises(DatasetError, match="none of its 1 tiles has its files"):
        read(write_tile(sen_name=f"{TILE}_2019.h5"))


def test_invalid_s2_values_are_corrected_and_noted(write_tile):
    content = h5_content()
    content["sen-2-data"][0, 0, 0, :3] = (12.4, 70_000, np.nan)
    tile = read(write_tile(content))
    assert tile.arrays["s2"][0, 0, 0, :3].tolist() == [12, 32767, 0]
    assert tile.masks["s2"][0, 1, 0].tolist() == [0, 0, 100, 0, 0, 0]
    assert tile.notes == (
        "s2 has NaN: stored as 0 and marked as cloud",
        "s2 has values that are not integers within int16: rounded and clipped",
        *RADAR_NOTES,
    )


def one_line(error: pytest.ExceptionInfo[DatasetError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_and_a_missing_split_are_named(write_tile, tmp_path):
    with pytest.raises(DatasetError) as error:
        open_raw("treesatai_ts", tmp_path / "nowhere", "train")
    assert "nowhere" in one_line(error)
    with pytest.raises(DatasetError) as error:
        open_raw("treesatai_ts", write_tile(), "trian")
    assert "splits found: train" in one_line(error)


def test_an_empty_split_is_an_error(write_tile):
    src = write_tile()
    write_csv(src / "val.csv", [])
    with pytest.raises(DatasetError) as error:
        open_raw("treesatai_ts", src, "val")
    assert "val.csv: the split is empty" in one_line(error)


def test_missing_files_are_counted_and_the_first_is_named(write_tile):
    src = write_tile()
    write_csv(
        src / "train.csv",
        [("a.tif", "a_2020.h5"), (f"{TILE}.tif", f"{TILE}_2020.h5"), ("b.tif", "b_2020.h5")],
    )
    reader = open_raw("treesatai_ts", src, "train")
    assert reader.keys() == sorted(["a", TILE, "b"])
    with pytest.raises(DatasetError) as error:
        reader.read("a")
    assert "aerial/a.tif: is missing (2 of 3 tiles in train.csv lack files)" in one_line(error)
    assert reader.read(TILE).key == TILE


@pytest.mark.parametrize("name", [f"aerial/{TILE}.tif", f"sentinel-ts/{TILE}_2020.h5"])
def test_a_truncated_file_is_named(write_tile, name):
    src = write_tile()
    content = (src / name).read_bytes()
    (src / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError) as error:
        read(src)
    assert name in one_line(error)


def test_wrong_shapes_are_named(write_tile):
    with pytest.raises(DatasetError) as error:
        read(write_tile(pixels=aerial_pixels()[:, :300, :300]))
    assert "4×300×300, expected uint8 4×304×304" in one_line(error)
    content = h5_content()
    content["sen-1-asc-data"] = content["sen-1-asc-data"][..., :5]
    with pytest.raises(DatasetError) as error:
        read(write_tile(content))
    assert "sen-1-asc-data: is float32 2×2×6×5, expected numbers T×2×6×6" in one_line(error)


@pytest.mark.parametrize(
    "product", [b"S2A_20200229", S2_PRODUCTS[0].replace(b"20200229T", b"20200231T"), b"a_b_c_d_e_f"]
)
def test_a_product_name_without_date_is_named(write_tile, product):
    content = h5_content()
    content["sen-2-products"] = np.array([*S2_PRODUCTS[:2], product], h5py.string_dtype("ascii"))
    with pytest.raises(DatasetError) as error:
        read(write_tile(content))
    assert "sen-2-products" in one_line(error)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real tile at {REAL}; set MAESTRO_TREESATAI_DIR")
def test_the_real_tile():
    tile = read(REAL)
    assert {m: a.shape for m, a in tile.arrays.items()} == {
        "aerial": (1, 4, 300, 300),
        "s2": (146, 10, 6, 6),
        "s1_asc": (115, 2, 6, 6),
        "s1_des": (235, 2, 6, 6),
    }
    # The asc file has 9 zeros and no NaN, the des file 4 of each.
    assert tile.notes == (RADAR_NOTES[1], RADAR_NOTES[2], RADAR_NOTES[3])
    assert tile.arrays["s2"].max() == 14088
    assert np.isnan(tile.arrays["s1_des"]).sum() == 4 + 4
    assert np.isnan(tile.arrays["s1_asc"]).sum() == 9
    assert len(np.unique(tile.dates["s1_des"], axis=0)) == 121
    prepared = np.load(REAL.parent / f"{REAL.name}_prepared.npz")
    np.testing.assert_array_equal(tile.ref_date, prepared["ref_date"].reshape(-1))
    np.testing.assert_array_equal(tile.arrays["aerial"] / np.float32(255), prepared["aerial"])
    # Every prepared date is one of the tile's, with its pixels.
    for modality in ("s2", "s1_asc", "s1_des"):
        have = {tuple(d) for d in tile.dates[modality].tolist()}
        assert {tuple(d) for d in prepared[f"{modality}_dates"].tolist()} <= have
    at = [tile.dates["s2"].tolist().index(d) for d in prepared["s2_dates"].tolist()]
    np.testing.assert_allclose(tile.arrays["s2"][at] / np.float32(5000), prepared["s2"], rtol=1e-6)
    over = tile.targets["species"] > SPEC.target("species").threshold
    np.testing.assert_array_equal(over, prepared["treesat_mlc_thresh"].reshape(-1).astype(bool))


def test_radar_whose_images_mix_vv_and_vh_is_noticed():
    """As in files of 2017 among the authors' test data. Here 6 dB apart, with speckle of 4.4 looks."""
    rng = np.random.default_rng(0)
    mean = np.array([0.1, 0.025], np.float32)[:, None, None]
    power = (mean * rng.gamma(4.4, 1 / 4.4, (60, 2, 6, 6))).astype(np.float32)
    power[3, 0, 0, 0] = np.nan
    assert not _mixes_polarisations(power)
    mixed = rng.permuted(power.reshape(60, -1), axis=1).reshape(power.shape)
    assert _mixes_polarisations(mixed)
    assert not _mixes_polarisations(mixed[:29])  # too few images to tell
    # Equally strong bands alone are no reason, nor are many reversed pixels alone.
    assert not _mixes_polarisations(np.stack([power[:, 0], power[:, 0] * 0.95], axis=1))
    single_look = (
        rng.gamma(1, 1, (60, 2, 6, 6)) * np.array([2, 1])[:, None, None]
    )  # 3 dB apart, a quarter reversed
    assert not _mixes_polarisations(single_look)
    assert not _mixes_polarisations(np.full_like(power, np.nan))


def test_mixed_radar_is_stored_with_a_note(write_tile):
    h5 = h5_content()
    rng = np.random.default_rng(1)
    mean = np.array([0.1, 0.025], np.float32)[:, None, None]
    power = (mean * rng.gamma(4.4, 1 / 4.4, (40, 2, 6, 6))).astype(np.float32)
    mixed = rng.permuted(power.reshape(40, -1), axis=1).reshape(power.shape)
    products = np.array([S1_PRODUCTS[0]] * 40, h5py.string_dtype("ascii"))
    h5 |= {"sen-1-asc-data": mixed, "sen-1-asc-products": products}
    h5 |= {"sen-1-des-data": power, "sen-1-des-products": products}
    tile = read(write_tile(h5))
    assert tile.notes == ("s1_asc mixes VV and VH within its images: stored as it is",)
    np.testing.assert_array_equal(tile.arrays["s1_asc"], mixed)

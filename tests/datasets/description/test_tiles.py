"""Tiles of files by a description: bands, dates, masks, targets, splits, and files that are not as described."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import xarray
from shapely.geometry import box
from testkit.described import SIZE, describe, opened, pixels, raster, write_tif

from maestro_scale.datasets.description.dataset import open_described
from maestro_scale.datasets.spec import MISSING_CLASS, DatasetError, GeoOrigin

ONE = {"dates": {"from": "constant", "date": "2020-06-01"}}


def error_of(dataset, key: str) -> DatasetError:
    with pytest.raises(DatasetError) as error:
        dataset.read(key)
    assert "\n" not in str(error.value)
    return error.value


def test_bands_in_one_file_and_in_many_are_the_same(tmp_path):
    values = pixels(3)
    write_tif(tmp_path / "one/a.tif", values)
    write_tif(tmp_path / "named/a.tif", values[[2, 0, 1]], names=("B4", "B2", "B3"))
    for band, image in zip(("b02", "b03", "b04"), values, strict=True):
        write_tif(tmp_path / f"many/a_{band}.tif", image[None])
    bands = [{"name": "B2", "from": "b02"}, {"name": "B3", "from": "b03"}, {"name": "B4", "from": "b04"}]
    picked = [{"name": "B4", "from": 3}, {"name": "B2", "from": 1}]
    rasters = {
        "one": raster("one/{key}.tif", ["B2", "B3", "B4"], **ONE),
        "named": raster("named/{key}.tif", ["B2", "B3", "B4"]),
        "many": raster("many/{key}_{band}.tif", bands),
        "picked": raster("one/{key}.tif", picked),
    }
    dataset = pickle.loads(pickle.dumps(opened(tmp_path, rasters)))
    tile = dataset.read("a")
    for name in ("one", "named", "many"):
        np.testing.assert_array_equal(tile.arrays[name][0], values)
    np.testing.assert_array_equal(tile.arrays["picked"][0], values[[2, 0]])
    assert tile.origin == GeoOrigin("EPSG:32632", 0.0, 5_000_000.0)
    assert tile.ref_date.tolist() == [2020, 153, 0]
    assert tile.dates["many"].tolist() == [[2020, 153, 0]]
    assert "many has no date: the reference date of the tile is taken" in tile.notes
    assert dataset.absent("a") == ()


def test_dates_of_names_tags_tables_and_text_files(tmp_path):
    for i, day in enumerate(("20200310", "20200110", "20200201")):
        tags = {"TIFFTAG_DATETIME": f"{day[:4]}:{day[4:6]}:{day[6:]} 11:30:00", "DAY": day}
        write_tif(tmp_path / f"s2/a_{day}.tif", pixels(fill=i), tags=tags)
        write_tif(tmp_path / f"tag/a_{i}.tif", pixels(fill=i), tags=tags)
    stack = np.concatenate([pixels(2, fill=i) for i in range(3)])
    write_tif(tmp_path / "stack/a.tif", stack)
    (tmp_path / "cell.csv").write_text('id,days\na.tif,"[""2020-03-10"", ""2020-01-10"", ""2020-02-01""]"\n')
    (tmp_path / "rows.csv").write_text(
        "file,date\na_0.tif,10/03/2020\na_1.tif,10/01/2020\na_2.tif,01/02/2020\n"
    )
    (tmp_path / "a.txt").write_text("X_20200310_1\nX_20200110_1\n\nX_20200201_1\n")
    axes = ["date", "band", "y", "x"]

    def series(files, dates=None, **keys):
        return raster(files, series=True, **({"dates": dates} if dates else {}), **keys)

    rasters = {
        "name": series("s2/{key}_{date}.tif"),
        "tag": series("tag/{key}_{n}.tif", "tag"),
        "own_tag": series("tag/{key}_{n}.tif", {"from": "tag", "tag": "DAY", "format": "%Y%m%d"}),
        "rows": series(
            "tag/{key}_{n}.tif", {"from": "csv", "file": "rows.csv", "key": "file", "format": "%d/%m/%Y"}
        ),
        "cell": series(
            "stack/{key}.tif",
            {"from": "csv", "file": "cell.csv", "column": "days"},
            axes=axes,
            bands=["B2", "B3"],
        ),
        "text": series(
            "stack/{key}.tif",
            {"from": "text", "file": "{key}.txt", "part": 1},
            axes=axes,
            bands=[{"name": "B3", "from": 2}],
            bands_per_date=2,
        ),
    }
    tile = opened(tmp_path, rasters).read("a")
    days = [[2020, 10, 0], [2020, 32, 0], [2020, 70, 0]]
    for name in rasters:
        hours = 11 if name == "tag" else 0
        assert tile.dates[name].tolist() == [[*day[:2], hours] for day in days], name
        band = 1 if name == "text" else 0
        assert tile.arrays[name][:, 0, 0, 0].tolist() == [fill + 1 + 64 * band for fill in (1, 2, 0)], name
    assert "cell is not in the order of time: sorted" in tile.notes
    assert "name is not in the order of time: sorted" not in tile.notes


def test_masks_from_classes_bits_and_percent(tmp_path):
    for day in ("20200101", "20200201"):
        write_tif(tmp_path / f"a_{day}.tif", np.concatenate([pixels(1), pixels(1, fill=500)]))
        classes = np.zeros((1, SIZE // 2, SIZE // 2), np.uint8)
        classes[0, 0, 0], classes[0, 1, 1] = (9, 11) if day == "20200101" else (4, 3)
        write_tif(tmp_path / f"a_{day}_scl.tif", classes, pixel_m=20.0)
    scl = "{key}_{date}_scl.tif"
    masks = {
        "cloud": {"files": scl, "classes": [3, 9]},
        "snow": {"files": scl, "bits": [1]},  # 11 and 3, of 9, 11, 4, 3
        "clear": {"files": scl, "above": 3.5, "invert": True},
        "share": {"files": scl, "percent": True},
        "high": {"band": 2, "above": 563},
    }
    bands = [{"name": "B2", "from": 1}]
    tile = opened(tmp_path, {"s2": raster("{key}_{date}.tif", bands, series=True, masks=masks)}).read("a")
    mask = dict(zip([*masks, "nodata"], tile.masks["s2"].swapaxes(0, 1), strict=True))
    assert mask["cloud"][0, :2, :2].tolist() == [[100, 100], [100, 100]]
    assert (int(mask["cloud"][0].sum()), int(mask["cloud"][1].sum())) == (400, 400)
    assert mask["cloud"][1, 2:4, 2:4].min() == 100
    assert mask["snow"][:, 2, 2].tolist() == [100, 100]
    assert mask["clear"][:, 0, 0].tolist() == [0, 0]
    assert mask["clear"][:, 2, 2].tolist() == [0, 100]
    assert mask["share"][:, 0, 0].tolist() == [9, 4]
    assert mask["high"][0, -1].tolist() == [0] * 7 + [100]
    assert not mask["nodata"].any()


def test_nodata_scale_offset_and_range(tmp_path):
    values = pixels(2).astype("int16")
    values[0, 0, :3] = -9999, 0, 7
    values[1, 0, 3] = 120
    write_tif(tmp_path / "a.tif", values, nodata=-9999)
    keys = {"dtype": "float32", "scale": 0.5, "offset": -1, "nodata": 0, "valid": [None, 58.5], **ONE}
    tile = opened(tmp_path, {"s2": raster("{key}.tif", ["B2", "B3"], **keys)}).read("a")
    array, mask = tile.arrays["s2"][0], tile.masks["s2"][0, 0]
    assert np.isnan(array[0, 0, :2]).all()
    assert array[0, 0, 2] == 2.5
    assert mask[0].tolist() == [100, 100, 0, 100, 0, 0, 0, 0]
    assert np.isnan(array[1, 0, 3])  # 120 / 2 - 1 is above the range
    assert "s2 has values that the file declares as nodata: marked as nodata" in tile.notes
    assert any("58.5" in note for note in tile.notes)
    keys |= {"dtype": "int16", "nodata_mask": False, "valid": None}
    tile = opened(tmp_path, {"s2": raster("{key}.tif", ["B2", "B3"], **keys)}).read("a")
    assert tile.masks == {}
    assert tile.arrays["s2"][0, 0, 0, :4].tolist() == [0, 0, 2, 1]  # rounded to even


def test_a_rule_called_nodata_marks_pixels_as_not_measured(tmp_path):
    write_tif(tmp_path / "a.tif", pixels(1))
    quality = np.zeros((1, SIZE, SIZE), np.uint8)
    quality[0, 3, 3] = 1
    write_tif(tmp_path / "a_qa.tif", quality)
    masks = {"nodata": {"files": "{key}_qa.tif", "classes": [1]}}
    tile = opened(tmp_path, {"s2": raster("{key}.tif", masks=masks, **ONE)}).read("a")
    assert tile.arrays["s2"][0, 0, 3, 3] == 0
    assert np.argwhere(tile.masks["s2"]).tolist() == [[0, 0, 3, 3]]


def test_windows_and_files_from_south_to_north(tmp_path):
    values = pixels(1, size=12)
    write_tif(tmp_path / "a.tif", values, west=-30.0, north=5_000_020.0)
    rasters = {"s2": raster("{key}.tif", window=[2, 3], **ONE)}
    tile = opened(tmp_path, rasters).read("a")
    np.testing.assert_array_equal(tile.arrays["s2"][0], values[:, 2:10, 3:11])
    assert tile.origin == GeoOrigin("EPSG:32632", 0.0, 5_000_000.0)
    from rasterio.transform import Affine

    (tmp_path / "south").mkdir()
    profile = {"count": 1, "height": 12, "width": 12, "dtype": "uint16", "crs": "EPSG:32632"}
    import rasterio

    upward = Affine(10, 0, -30, 0, 10, 5_000_020 - 120)
    with rasterio.open(tmp_path / "south/a.tif", "w", driver="GTiff", transform=upward, **profile) as file:
        file.write(values[:, ::-1])
    same = opened(tmp_path / "south", rasters).read("a")
    np.testing.assert_array_equal(same.arrays["s2"], tile.arrays["s2"])
    assert same.origin == tile.origin


def test_targets_from_images_tables_and_names(tmp_path):
    for key, kind in (("a", "oak"), ("b", "pine"), ("c", "oak")):
        write_tif(tmp_path / f"{kind}/{key}.tif", pixels(1))
    labels = np.full((1, SIZE, SIZE), 20, np.uint8)
    labels[0, 0, :4] = 0, 21, 99, 255
    write_tif(tmp_path / "labels/a.tif", labels, nodata=0)
    heights = np.full((1, SIZE, SIZE), 3, np.float32)
    heights[0, 0, 0] = -1
    write_tif(tmp_path / "height/a.tif", heights, nodata=-1)
    (tmp_path / "t.csv").write_text(
        'tile,genus,t_ha,A,B,all\na,Oak,12.5,0.25,0.75,"A, B"\nb,,,1,0,B\nc,Elm,1e9,0,1,\n'
    )
    classes = ["water", "forest", "none"]
    image = {"files": "labels/{key}.tif", "nodata": 255}
    targets = {
        "cover": {
            "kind": "segmentation",
            "raster": image,
            "resolution_m": 10,
            "classes": classes,
            "ignored": ["none"],
            "values": {0: "water", 20: "forest", 21: "forest", 99: None},
        },
        "shares": {"kind": "multilabel", "of": "cover", "classes": ["forest", "water"]},
        "height": {
            "kind": "regression",
            "raster": {"files": "height/{key}.tif"},
            "resolution_m": 10,
            "scale": 2,
        },
        "genus": {
            "kind": "classification",
            "classes": ["oak", "pine"],
            "values": {"Oak": "oak"},
            "table": {"file": "t.csv", "column": "genus"},
        },
        "folder": {"kind": "classification", "classes": ["pine", "oak"], "name": "tree"},
        "mass": {"kind": "regression", "units": "t/ha", "table": {"file": "t.csv", "column": "t_ha"}},
        "parts": {"kind": "multilabel", "classes": ["A", "B"], "table": {"file": "t.csv", "key": "tile"}},
        "present": {"kind": "multilabel", "classes": ["A", "B"], "table": {"file": "t.csv", "column": "all"}},
    }
    rasters = {"s2": raster("{tree}/{key}.tif", exclude=["labels/*.tif", "height/*.tif"], **ONE)}
    dataset = opened(tmp_path, rasters, targets=targets)
    assert dataset.keys() == ["a", "b", "c"]
    found = dataset.read("a").targets
    assert found["cover"].dtype == np.uint8
    assert found["cover"][0, :5].tolist() == [0, 1, 2, 2, 1]
    assert found["shares"].tolist() == [61 / 64, 1 / 64]
    assert (np.isnan(found["height"][0, 0]), float(found["height"][1, 1])) == (True, 6.0)
    assert found["genus"].tolist() == [0]
    assert found["folder"].tolist() == [1]
    assert found["mass"].tolist() == [12.5]
    assert found["parts"].tolist() == [0.25, 0.75]
    assert found["present"].tolist() == [1, 1]
    tables = {name: targets[name] for name in ("genus", "folder", "mass", "present")}
    tile = opened(tmp_path, rasters, targets=tables).read("b")
    assert tile.targets["genus"].tolist() == [MISSING_CLASS]
    assert np.isnan(tile.targets["mass"]).all()
    assert tile.targets["present"].tolist() == [0, 1]
    assert {"genus has no label", "mass has no label"} <= set(tile.notes)
    error = error_of(opened(tmp_path, rasters, targets=tables), "c")
    assert "t.csv: c: genus is 'Elm'" in str(error)
    assert error.kind == "a label outside the list"


def test_an_empty_share_is_0_beside_others_and_no_label_where_all_are_empty(tmp_path):
    for key in "ab":
        write_tif(tmp_path / f"{key}.tif", pixels(1))
    (tmp_path / "t.csv").write_text("tile,A,B\na,0.25,\nb,,\n")
    target = {"kind": "multilabel", "classes": ["A", "B"], "table": {"file": "t.csv", "key": "tile"}}
    dataset = opened(tmp_path, {"s2": raster("{key}.tif", **ONE)}, targets={"parts": target})
    assert dataset.read("a").targets["parts"].tolist() == [0.25, 0]
    error = error_of(dataset, "b")
    assert (error.kind, "t.csv: b: has a row, but no share of any class of parts" in str(error)) == (
        "no label",
        True,
    )


def test_label_images_that_do_not_fit(tmp_path):
    write_tif(tmp_path / "a.tif", pixels(1))
    labels = np.zeros((1, SIZE, SIZE), np.uint8)
    labels[0, 0, 0] = 7
    write_tif(tmp_path / "labels/a.tif", labels)
    target = {
        "kind": "segmentation",
        "raster": {"files": "labels/{key}.tif"},
        "resolution_m": 10,
        "classes": ["x", "y"],
    }
    rasters = {"s2": raster("{key}.tif", **ONE)}
    error = error_of(opened(tmp_path, rasters, targets={"t": target}), "a")
    assert "labels/a.tif: holds 7, which t has no class for (known: 0, 1)" in str(error)
    target["raster"]["nodata"] = 7
    error = error_of(opened(tmp_path, rasters, targets={"t": target}), "a")
    assert (error.kind, "1 pixels have no label" in str(error)) == ("pixels without a label", True)


@pytest.mark.parametrize("tag", [None, 0, 7])
@pytest.mark.parametrize("suffix", [".tif", ".nc"])
def test_a_mask_band_leaves_labels_out_and_a_nodata_tag_that_is_a_class_does_not(tmp_path, tag, suffix):
    values = np.zeros((1, SIZE, SIZE), "uint8")
    values[0, :2], values[0, 2] = 1, 7
    write_tif(tmp_path / "a.tif", pixels(1))
    if suffix == ".nc":
        array = xarray.DataArray(values[0], dims=("y", "x"), attrs={} if tag is None else {"_FillValue": tag})
        array.to_dataset(name="map").to_netcdf(tmp_path / "labels_a.nc")
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            write_tif(tmp_path / "labels_a.tif", values, nodata=tag)
            if tag != 7:  # a mask band of GDAL excludes a nodata value
                with rasterio.open(tmp_path / "labels_a.tif", "r+") as file:
                    file.write_mask(np.arange(SIZE)[None].repeat(SIZE, 0) != 3)
    section = {"files": f"labels_{{key}}{suffix}", "nodata": [] if tag == 7 else 7}
    if suffix == ".nc":
        section["variable"] = "map"
    target = {
        "kind": "segmentation",
        "raster": section,
        "resolution_m": 10,
        "classes": ["x", "y", "none"],
        "ignored": ["none"],
    }
    wanted = np.zeros((SIZE, SIZE), int)
    wanted[:2], wanted[2] = 1, 2
    if suffix == ".tif" and tag != 7:
        wanted[:, 3] = 2
    tile = opened(tmp_path, {"s2": raster("{key}.tif", **ONE)}, targets={"t": target}).read("a")
    np.testing.assert_array_equal(tile.targets["t"], wanted)


def write_many(tmp_path: Path) -> dict:
    for key in "abcd":
        write_tif(tmp_path / f"s2/{key}.tif", pixels(1))
    return {"s2": raster("s2/{key}.tif", **ONE)}


def test_splits_by_lists_columns_folders_and_none(tmp_path):
    rasters = write_many(tmp_path)
    assert opened(tmp_path, rasters).keys() == list("abcd")
    with pytest.raises(DatasetError, match="has no splits, so all tiles are in 'train', none in 'val'"):
        opened(tmp_path, rasters, "val")
    (tmp_path / "train.txt").write_text("b\n\na\n")
    (tmp_path / "val_list.csv").write_text("id,file\n1,s2/c.tif\n")
    assert opened(tmp_path, rasters, splits={"lists": {"file": "{split}.txt"}}).keys() == ["a", "b"]
    lists = {"lists": {"file": "{split}_list.csv", "column": "file"}}
    assert opened(tmp_path, rasters, "val", splits=lists).keys() == ["c"]
    with pytest.raises(DatasetError, match=r"test.txt: is missing, so there is no split 'test'"):
        opened(tmp_path, rasters, "test", splits={"lists": {"file": "{split}.txt"}})
    (tmp_path / "table.csv").write_text("id,part\na,training\nb,1\nc,test\n")
    column = {"column": {"file": "table.csv", "column": "part"}, "names": {"train": ["training", "1"]}}
    assert opened(tmp_path, rasters, splits=column).keys() == ["a", "b"]
    with pytest.raises(DatasetError, match="column 'part' has no 'val' but '1', 'test', 'training'"):
        opened(tmp_path, rasters, "val", splits=column)
    (tmp_path / "train.txt").write_text("a\na\n")
    with pytest.raises(DatasetError, match="names 1 tiles twice, first 'a'"):
        opened(tmp_path, rasters, splits={"lists": {"file": "{split}.txt"}})
    write_tif(tmp_path / "Training/x.tif", pixels(1))
    write_tif(tmp_path / "test/x.tif", pixels(1, fill=5))
    folders = {"s2": raster("{split}/{key}.tif", exclude=["s2/*.tif"], **ONE)}
    names = {"names": {"train": "Training"}}
    assert opened(tmp_path, folders, splits=names).read("x").arrays["s2"].min() == 1
    assert opened(tmp_path, folders, "test", splits=names).read("x").arrays["s2"].min() == 6
    with pytest.raises(DatasetError, match="no file of split 'val'; there are files of Training, test"):
        opened(tmp_path, folders, "val", splits=names)


def test_a_listed_tile_without_files_is_counted_not_lost(tmp_path):
    rasters = write_many(tmp_path)
    (tmp_path / "train.txt").write_text("a\nz\n")
    dataset = opened(tmp_path, rasters, splits={"lists": {"file": "{split}.txt"}})
    assert dataset.keys() == ["a", "z"]
    assert error_of(dataset, "z").kind == "a file is missing"


def test_a_tile_that_lacks_a_raster_is_kept_unless_it_is_required(tmp_path):
    rasters = write_many(tmp_path)
    write_tif(tmp_path / "s1/b.tif", pixels(1))
    rasters["s1"] = raster("s1/{key}.tif", **ONE)
    dataset = opened(tmp_path, rasters)
    assert [dataset.absent(key) for key in "ab"] == [("s1",), ()]
    assert set(dataset.read("a").arrays) == {"s2"}
    rasters["s1"]["required"] = True
    assert error_of(opened(tmp_path, rasters), "a").kind == "a file is missing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "s3/{key}.tif"}, r"rasters\.s2\.files: no file matches s3/\{key\}\.tif in .*holds 's2'"),
        ({"files": "s2/{key}_x.tif"}, r"s2 holds 'a.tif', 'b.tif', 'c.tif' and 1 more"),
        ({"files": "s2/{name}.tif"}, r"rasters\.s2\.files: s2/\{name\}\.tif says no tile: add \{key\}"),
        ({"files": "s2/{key}"}, "the suffix does not say the storage format; set source"),
        ({"files": "s2/{key}_{band}.tif", "bands": [{"name": "B", "from": 1}]}, "band 1 is given by number"),
    ],
)
def test_a_pattern_that_does_not_fit_ends_the_command(tmp_path, change, message):
    rasters = write_many(tmp_path)
    rasters["s2"] |= change
    with pytest.raises(DatasetError, match=message) as error:
        opened(tmp_path, rasters)
    assert "\n" not in str(error.value)


def test_rasters_without_a_common_tile_end_the_command(tmp_path):
    rasters = write_many(tmp_path)
    write_tif(tmp_path / "s1/a_s1.tif", pixels(1))
    with pytest.raises(DatasetError, match=r"no tile has both s2/\{key\}\.tif \(first 'a'\) and s1/"):
        opened(tmp_path, {**rasters, "s1": raster("s1/{key}.tif", **ONE)})
    (tmp_path / "t.csv").write_text("tile,c\nz,oak\n")
    target = {"kind": "classification", "classes": ["oak", "elm"], "table": {"file": "t.csv", "column": "c"}}
    with pytest.raises(
        DatasetError, match=r"t\.csv: column 'tile' has none of the 4 tiles, first 'a'; it holds"
    ):
        opened(tmp_path, rasters, targets={"t": target})
    target["table"]["column"] = "d"
    with pytest.raises(DatasetError, match=r"t\.csv: has no column 'd'"):
        opened(tmp_path, rasters, targets={"t": target})


def test_a_file_belongs_to_the_pattern_with_the_most_literal_text(tmp_path):
    write_tif(tmp_path / "a.tif", pixels(1))
    write_tif(tmp_path / "a_dem.tif", pixels(1, fill=9))
    dataset = opened(tmp_path, {"s2": raster("{key}.tif", **ONE), "dem": raster("{key}_dem.tif", **ONE)})
    assert dataset.keys() == ["a"]
    assert dataset.read("a").arrays["dem"].min() == 10


BAD = {
    "another size": (
        lambda path: write_tif(path, pixels(1, size=9)),
        "an image of another size",
        r"b\.tif: has 9×9 pixels, expected 8×8",
    ),
    "another resolution": (
        lambda path: write_tif(path, pixels(1), pixel_m=20.0),
        "pixels of another size",
        r"b\.tif: has pixels of 20 by 20, the description says 10 m",
    ),
    "another crs": (
        lambda path: write_tif(path, pixels(1), crs="EPSG:2154"),
        "another coordinate system",
        r"b\.tif: s1 is in EPSG:2154, s2 in EPSG:32632",
    ),
    "another place": (
        lambda path: write_tif(path, pixels(1), west=800.0),
        "rasters that do not cover the same ground",
        r"b\.tif: s1 begins 800 from where s2 begins",
    ),
    "too few bands": (
        lambda path: write_tif(path, pixels(2)),
        "another number of bands",
        r"b\.tif: has 2 bands, .* lists 1 \(B2\)",
    ),
    "damaged": (
        lambda path: path.write_bytes(b"II*\0 no tiff"),
        "cannot be read",
        r"b\.tif: cannot be read",
    ),
    "empty": (
        lambda path: write_tif(path, pixels(1), nodata=1).write_bytes(b""),
        "cannot be read",
        r"b\.tif: cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_concerns_its_tile_alone(tmp_path, name):
    write, kind, message = BAD[name]
    for key in "ab":
        write_tif(tmp_path / f"s2/{key}.tif", pixels(1))
        write_tif(tmp_path / f"s1/{key}.tif", pixels(1))
    write(tmp_path / "s1/b.tif")
    dataset = opened(tmp_path, {"s2": raster("s2/{key}.tif", **ONE), "s1": raster("s1/{key}.tif", **ONE)})
    assert set(dataset.read("a").arrays) == {"s1", "s2"}
    error = error_of(dataset, "b")
    assert error.kind == kind
    with pytest.raises(DatasetError, match=message):
        raise error


def test_a_missing_coordinate_system_can_be_given(tmp_path):
    write_tif(tmp_path / "a.tif", pixels(1), crs=None)
    tile = opened(tmp_path, {"s2": raster("{key}.tif", **ONE)}).read("a")
    assert tile.origin is None
    assert "no file says where the tile lies: stored without origin" in tile.notes
    rasters = {"s2": raster("{key}.tif", crs="EPSG:32631", **ONE)}
    assert opened(tmp_path, rasters).read("a").origin == GeoOrigin("EPSG:32631", 0.0, 5_000_000.0)


def test_pixels_of_web_mercator_have_their_size_on_the_ground(tmp_path):
    """At 60° N, 20 m in Web Mercator are 10 m."""
    place = {"crs": "EPSG:3857", "north": 8_400_000}
    write_tif(tmp_path / "a.tif", pixels(1), pixel_m=20, **place)
    tile = opened(tmp_path, {"s2": raster("{key}.tif", **ONE)}).read("a")
    assert tile.origin is None
    assert "coordinates are in EPSG:3857, not in metres on the ground: stored without origin" in tile.notes
    write_tif(tmp_path / "a.tif", pixels(1), pixel_m=10, **place)
    error = error_of(opened(tmp_path, {"s2": raster("{key}.tif", **ONE)}), "a")
    assert "has pixels of 5.01 by 5 on the ground (EPSG:3857 is not true to scale" in str(error)


def test_dates_that_cannot_be_read(tmp_path, caplog):
    for name in ("a_20200101", "a_20201301", "b_20200101", "b_2020-x"):
        write_tif(tmp_path / f"{name}.tif", pixels(1))
    with caplog.at_level(logging.WARNING):
        dataset = opened(tmp_path, {"s2": raster("{key}_{date:%Y%m%d}.tif", series=True)})
    assert "1 files match {key}_{date:%Y%m%d}.tif but for the date" in caplog.text
    assert "b_2020-x.tif" in caplog.text
    assert dataset.read("b").dates["s2"].tolist() == [[2020, 1, 0]]
    error = error_of(dataset, "a")
    assert "a_20201301.tif: has a date that is not in the calendar" in str(error)
    (tmp_path / "d.csv").write_text("tile,date\na,soon\nb,2020-01-01\n")
    rasters = {"s2": raster("{key}_20200101.tif", dates={"from": "csv", "file": "d.csv"})}
    dataset = opened(tmp_path, rasters)
    assert dataset.read("b").dates["s2"].tolist() == [[2020, 1, 0]]
    error = error_of(dataset, "a")
    assert (error.kind, "d.csv: a: 'soon' is not a date" in str(error)) == ("a date cannot be read", True)


def test_images_that_lie_a_part_of_a_pixel_apart_are_noted(tmp_path):
    write_tif(tmp_path / "a_20200101.tif", pixels(1))
    write_tif(tmp_path / "a_20200201.tif", pixels(1), west=5.0)  # half a pixel
    write_tif(tmp_path / "b_20200101.tif", pixels(1))
    dataset = opened(tmp_path, {"s2": raster("{key}_{date:%Y%m%d}.tif", series=True)})
    note = "s2 has images that begin less than a pixel apart: taken as aligned"
    assert (note in dataset.read("a").notes, note in dataset.read("b").notes) == (True, False)


@pytest.mark.parametrize(
    ("mask", "place", "message"),
    [
        ("SCL_20200201", {}, "the image of year 2020, day 1 has no mask cloud"),
        ("SCL_20200101", {"west": 800.0}, "its mask cloud begins 800 from where s2 begins"),
        ("SCL_20200101", {"crs": "EPSG:32633"}, "its mask cloud is in EPSG:32633, s2 in EPSG:32632"),
    ],
)
def test_a_mask_of_another_day_or_place_is_not_taken(tmp_path, mask, place, message):
    write_tif(tmp_path / "a_20200101.tif", pixels(1))
    write_tif(tmp_path / f"a_{mask}.tif", pixels(1), **place)
    masks = {"cloud": {"files": "{key}_SCL_{date:%Y%m%d}.tif", "classes": [9]}}
    dataset = opened(tmp_path, {"s2": raster("{key}_{date:%Y%m%d}.tif", masks=masks)})
    assert message in str(error_of(dataset, "a"))


def test_names_that_are_no_text_are_left_out(tmp_path, caplog):
    write_tif(tmp_path / "a.tif", pixels(1))
    os.link(tmp_path / "a.tif", os.fsencode(tmp_path) + b"/\xe9t\xe9.tif")
    with caplog.at_level(logging.WARNING):
        dataset = opened(tmp_path, {"s2": raster("{key}.tif", **ONE)})
    assert dataset.keys() == ["a"]
    assert r"1 files match {key}.tif, but their names are not UTF-8" in caplog.text
    assert r"\xe9t\xe9.tif" in caplog.text


def test_images_that_do_not_go_together(tmp_path):
    for name in ("a_20200101", "a_20200201", "x_20200101_m"):
        write_tif(tmp_path / f"{name}.tif", pixels(1))
    files = "{key}_{date}.tif"
    error = error_of(opened(tmp_path, {"s2": raster(files)}), "a")
    assert error.kind == "several images of a raster that is no series"
    error = error_of(opened(tmp_path, {"s2": raster("{key}_*.tif", exclude=["x*"], **ONE)}), "a")
    assert error.kind == "two files of one image"
    masks = {"cloud": {"files": "{key}_{date}_m.tif", "classes": [1]}}
    write_tif(tmp_path / "a_20200101_m.tif", pixels(1))
    error = error_of(opened(tmp_path, {"s2": raster(files, series=True, masks=masks)}), "a")
    assert (error.kind, "year 2020, day 32 has no mask cloud" in str(error)) == ("a mask is missing", True)
    bands = [{"name": "B2", "from": "x"}, {"name": "B3", "from": "y"}]
    write_tif(tmp_path / "q/a_x.tif", pixels(1))
    error = error_of(opened(tmp_path / "q", {"s2": raster("{key}_{band}.tif", bands, **ONE)}), "a")
    assert error.kind == "a band is missing"
    error = error_of(opened(tmp_path, {"s2": raster("{key}_{n}.tif", exclude=["*_m.tif"], series=True)}), "a")
    assert (error.kind, "rasters.s2.dates" in str(error)) == ("no date", True)


def test_files_of_another_type_are_converted_and_noted(tmp_path):
    write_tif(tmp_path / "a.tif", pixels(1, dtype="float32"))
    write_tif(tmp_path / "b.tif", pixels(1, dtype="uint8"))
    write_tif(tmp_path / "c.tif", pixels(1, dtype="float32") + 0.25)
    dataset = opened(tmp_path, {"s2": raster("{key}.tif", **ONE)})
    assert [dataset.read(key).arrays["s2"].dtype for key in "abc"] == [np.uint16] * 3
    assert "s2 has files of type float32: stored as uint16" in dataset.read("a").notes
    assert dataset.read("b").notes == ()
    assert any("not integers" in note for note in dataset.read("c").notes)


def test_rasters_can_be_selected(tmp_path):
    rasters = write_many(tmp_path)
    rasters["s1"] = raster("s1/{key}.tif", **ONE)
    description = describe(rasters, sensors={"again": {"source": "s1", "scale": {"divisor": 1.0}}})
    dataset = open_described(description, str(tmp_path), "train", ["s2"])
    assert [s.name for s in dataset.spec.sensors] == ["s2"]
    with pytest.raises(DatasetError, match="has no modality 's3'; there are: s2, s1"):
        open_described(description, str(tmp_path), "train", ["s3"])


def test_files_and_tables_at_an_address(tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    for key in "ab":
        store.pipe(f"/tiles/s2/{key}.tif", write_tif(tmp_path / f"{key}.tif", pixels(1)).read_bytes())
    store.pipe("/tiles/train.txt", b"a\n")
    store.pipe("/tiles/days.csv", b"tile,date\na,2020-01-02\n")
    store.pipe("/tiles/t.csv", b"tile,x\na,1.5\n")
    target = {"kind": "regression", "table": {"file": "t.csv", "column": "x"}}
    rasters = {"s2": raster("s2/{key}.tif", dates={"from": "csv", "file": "days.csv"})}
    options = {"targets": {"x": target}, "splits": {"lists": {"file": "{split}.txt"}}}
    dataset = open_described(describe(rasters, **options), "memory://tiles", "train")
    assert dataset.keys() == ["a"]
    tile = dataset.read("a")
    np.testing.assert_array_equal(tile.arrays["s2"][0], pixels(1))
    assert (tile.dates["s2"].tolist(), tile.targets["x"].tolist()) == ([[2020, 2, 0]], [1.5])
    frame = geopandas.GeoDataFrame(
        {"tile": ["b"], "split": ["train"]}, geometry=[box(0, 0, 1, 1)], crs="EPSG:32632"
    )
    frame.to_file(tmp_path / "t.gpkg")
    store.pipe("/tiles/t.gpkg", (tmp_path / "t.gpkg").read_bytes())
    columns = {"splits": {"column": {"file": "t.gpkg"}}}
    assert open_described(describe(rasters, **columns), "memory://tiles", "train").keys() == ["b"]
    with pytest.raises(DatasetError, match=r"memory://tiles/val\.txt: is missing"):
        open_described(describe(rasters, **options), "memory://tiles", "val")

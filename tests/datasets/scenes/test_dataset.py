"""Described scenes: from files to shards, with labels, an area and splits; and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import fsspec
import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from testkit.scene_files import write_scene

from maestro_scale.datasets.description.dataset import open_described
from maestro_scale.datasets.description.load import load_description
from maestro_scale.datasets.description.spec import settings_of
from maestro_scale.datasets.spec import DatasetError, LeftOut
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import write_shards

WEST, NORTH, CRS = 499_840.0, 5_000_000.0, "EPSG:32631"
DESCRIPTION = """
name: valley
tile_m: 320
grid: {min_valid: 0.5}
rasters:
  s2:
    files: "S2_{tile}_{date:%Y%m%d}.tif"
    bands: [B2, B3]
    resolution_m: 10
    dtype: uint16
    series: true
    quantity: reflectance
    masks: {cloud: {files: "SCL_{tile}_{date:%Y%m%d}.tif", classes: [9]}}
    sensor: {patch: 2, num_dates: 2}
  dem:
    files: dem.tif
    bands: [height]
    resolution_m: 20
    dtype: float32
    dates: {from: constant, date: 2020-01-01}
    quantity: elevation
    sensor: {patch: 4}
"""
LABELS = """
targets:
  cover:
    kind: segmentation
    vector: {files: cover.gpkg, column: kind}
    resolution_m: 10
    classes: [forest, meadow, other]
    ignored: [other]
    outside: other
  map:
    kind: segmentation
    raster: {files: map.tif, nodata: 255}
    resolution_m: 20
    classes: [a, b, none]
    ignored: [none]
  height:
    kind: regression
    vector: {files: cover.gpkg, column: height}
    resolution_m: 20
"""
BLOCKS = """
splits: {blocks: {size_m: 640, fractions: {train: 0.5, val: 0.25, test: 0.25}, distance_m: 100}}
"""


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    """Two granules of two dates each, which overlap by 64 pixels; an elevation model; labels."""
    folder = tmp_path_factory.mktemp("src")
    rng = np.random.default_rng(0)
    for i, tile in enumerate(("A", "B")):
        for day in ("20200601", "20200701"):
            values = rng.integers(1, 5000, (2, 320, 192)).astype("uint16")
            write_scene(folder / f"S2_{tile}_{day}.tif", values, WEST + i * 1280, NORTH, nodata=0)
            cloud = rng.choice([4, 9], (1, 160, 96)).astype("uint8")
            write_scene(folder / f"SCL_{tile}_{day}.tif", cloud, WEST + i * 1280, NORTH, 20.0)
    height = rng.uniform(0, 900, (1, 200, 200)).astype("float32")
    write_scene(folder / "dem.tif", height, WEST - 320, NORTH + 320, 20.0, nodata=-9999)
    write_scene(
        folder / "map.tif",
        rng.choice([0, 1, 255], (1, 200, 200)).astype("uint8"),
        WEST - 320,
        NORTH + 320,
        20,
    )
    boxes = [
        shapely.box(WEST, NORTH - 100, WEST + 1000, NORTH),
        shapely.box(WEST + 500, NORTH - 3200, WEST + 900, NORTH),
    ]
    frame = geopandas.GeoDataFrame(
        {"kind": ["forest", "meadow"], "height": [10.0, 20.0]}, geometry=boxes, crs=CRS
    )
    frame.to_file(folder / "cover.gpkg", driver="GPKG")
    area = shapely.box(WEST, NORTH - 640, WEST + 960, NORTH)
    geopandas.GeoDataFrame(geometry=[area], crs=CRS).to_crs(4326).to_file(
        folder / "area.geojson", driver="GeoJSON"
    )
    return folder


def described(folder: Path, text: str, *overrides: str):
    path = folder / "valley.yaml"
    path.write_text(text)
    return load_description(path, overrides)


def opened(src: Path, tmp_path: Path, text: str = DESCRIPTION, *overrides: str, split: str = "train"):
    return open_described(described(tmp_path, text, *overrides), str(src), split)


def test_scenes_become_shards(src, tmp_path):
    dataset = opened(src, tmp_path, DESCRIPTION + LABELS)
    keys = dataset.keys()
    assert len(keys) == 100
    assert keys[0] == "32631_E0499840_N4997120"
    manifest = write_shards(dataset, str(tmp_path / "shards"), "train", workers=1, shard_mb=1, strict=True)
    assert sum(s.samples for s in manifest.shards) == 100
    assert verify(str(tmp_path / "shards")) == []
    tile = dataset.read("32631_E0501440_N5000000")
    assert tile.arrays["s2"].shape == (2, 2, 32, 32)
    assert tile.arrays["dem"].shape == (1, 1, 16, 16)
    assert tile.dates["s2"][:, 1].tolist() == [153, 183]
    assert set(np.unique(tile.masks["s2"][:, 0])) <= {0, 100}
    assert (tile.origin.crs, tile.origin.west_m, tile.origin.north_m) == (CRS, 501_440, NORTH)


def test_labels_are_rasterised(src, tmp_path):
    tile = opened(src, tmp_path, DESCRIPTION + LABELS).read("32631_E0500160_N5000000")
    cover = np.full((32, 32), 2)
    cover[:10] = 0
    cover[:, 18:] = 1  # from 500,340 m on, drawn later
    np.testing.assert_array_equal(tile.targets["cover"], cover)
    heights = np.array([10, 20, np.nan])[cover[1::2, 1::2]]
    np.testing.assert_array_equal(tile.targets["height"], heights)
    assert set(np.unique(tile.targets["map"])) == {0, 1, 2}


@pytest.mark.parametrize("shift", [0.0, 7.0])  # copied, and resampled
@pytest.mark.parametrize("tag", [None, 0, 255])
def test_ground_that_no_label_image_shows_has_no_label(tmp_path, tag, shift):
    write_scene(tmp_path / "S2_A_20200601.tif", np.ones((2, 32, 32), "uint16"), WEST, NORTH)
    labels = np.zeros((1, 16, 8), "uint8")
    labels[:, 4:] = 1
    labels[:, 12:] = 255
    write_scene(tmp_path / "map.tif", labels, WEST + shift, NORTH, 20.0, nodata=tag)
    text = DESCRIPTION.replace("    masks: {cloud", "    # masks: {cloud")
    text = (
        text[: text.index("  dem:")]
        + "targets:"
        + LABELS[LABELS.index("\n  map:") : LABELS.index("\n  height:")]
    )
    (found,) = opened(tmp_path, tmp_path, text).read(f"32631_E{WEST:07.0f}_N{NORTH:07.0f}").targets.values()
    wanted = np.full((16, 16), 2)  # "none"
    wanted[:4, :8], wanted[4:12, :8] = 0, 1
    np.testing.assert_array_equal(found, wanted)


def test_a_mask_band_leaves_labels_out_of_scenes(tmp_path):
    write_scene(tmp_path / "S2_A_20200601.tif", np.ones((2, 32, 32), "uint16"), WEST, NORTH)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = write_scene(tmp_path / "map.tif", np.zeros((1, 16, 16), "uint8"), WEST, NORTH, 20.0)
        with rasterio.open(path, "r+") as file:
            file.write_mask(np.arange(16)[None].repeat(16, 0) < 4)
    text = DESCRIPTION[: DESCRIPTION.index("    masks: {cloud")] + "    sensor: {patch: 2}\n"
    text += "targets:" + LABELS[LABELS.index("\n  map:") : LABELS.index("\n  height:")]
    (found,) = opened(tmp_path, tmp_path, text).read(f"32631_E{WEST:07.0f}_N{NORTH:07.0f}").targets.values()
    assert (found[:, :4] == 0).all()
    assert (found[:, 4:] == 2).all()  # none


def test_a_process_that_writes_reads_the_same(src, tmp_path):
    dataset = opened(src, tmp_path, DESCRIPTION + LABELS)
    key = dataset.keys()[40]
    there = pickle.loads(pickle.dumps(dataset))
    assert there.cells == ()
    with there.run([key]):
        tile = there.read(key)
    for name, array in dataset.read(key).arrays.items():
        np.testing.assert_array_equal(tile.arrays[name], array)


def test_images_in_two_systems_need_a_grid_in_one(src, tmp_path):
    for i, crs in enumerate((CRS, CRS, "EPSG:32632")):
        write_scene(tmp_path / f"S2_{i}_20200601.tif", np.ones((2, 64, 64), "uint16"), WEST, NORTH, crs=crs)
    text = DESCRIPTION.replace("    masks: {cloud", "    # masks: {cloud")
    text = text[: text.index("  dem:")]
    message = (
        r"the images have 2 coordinate systems: EPSG:32631 \(2 images\) and others in 1, the first: S2_2_20200601.tif "
        r"\(EPSG:32632\); set grid.crs"
    )
    with pytest.raises(DatasetError, match=message):
        opened(tmp_path, tmp_path, text)
    assert len(opened(tmp_path, tmp_path, text, f"grid.crs={CRS}").keys()) >= 4


def test_scenes_in_web_mercator_are_warped_to_a_system_that_is_true_to_scale(src, tmp_path):
    """At 60° N, a pixel of 20 m in Web Mercator is 10 m on the ground."""
    values = np.arange(2 * 64 * 64, dtype="uint16").reshape(2, 64, 64) + 1
    write_scene(tmp_path / "S2_A_20200601.tif", values, 1_000_000, 8_400_000, 20.0, crs="EPSG:3857")
    text = DESCRIPTION.replace("    masks: {cloud", "    # masks: {cloud")
    text = text[: text.index("  dem:")].replace("tile_m: 320", "tile_m: 160")
    with pytest.raises(DatasetError, match=r"Pseudo-Mercator is not true to scale .* EPSG:32632 "):
        opened(tmp_path, tmp_path, text)
    dataset = opened(tmp_path, tmp_path, text, "grid.crs=EPSG:32632")
    assert 9 <= len(dataset.keys()) <= 25  # 640 m a side, somewhat rotated
    assert dataset.read(dataset.keys()[4]).arrays["s2"].shape == (1, 2, 16, 16)


def test_damaged_images_are_told_with_their_number(src, tmp_path):
    for i in range(3):
        path = write_scene(tmp_path / f"S2_{i}_20200601.tif", np.ones((2, 64, 64), "uint16"), WEST, NORTH)
        if i:
            path.write_bytes(b"II*\0" + bytes(20))
    text = DESCRIPTION.replace("    masks: {cloud", "    # masks: {cloud")
    text = text[: text.index("  dem:")]
    with pytest.raises(
        DatasetError, match=r"2 images of rasters\.s2 cannot be read, the first: .*S2_1_20200601\.tif: cannot"
    ):
        opened(tmp_path, tmp_path, text)
    path.unlink()
    values = np.random.default_rng(0).integers(1, 5000, (2, 128, 128)).astype("uint16")
    path = write_scene(tmp_path / "S2_1_20200601.tif", values, WEST, NORTH)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    path.with_name("S2_0_20200601.tif").unlink()
    dataset = opened(tmp_path, tmp_path, text)
    manifest = write_shards(dataset, str(tmp_path / "shards"), "train", strict=False)
    assert manifest.notes["left out: cannot be read"] == 8
    assert "S2_1_20200601.tif: cannot be read" in manifest.examples["left out: cannot be read"]


@pytest.mark.parametrize("name", ["S2_A_20200631", "SCL_A_20200631"])
def test_a_date_that_is_not_in_the_calendar_is_said_so(src, tmp_path, name):
    for path in src.glob("*.tif"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / f"{name}.tif").symlink_to(src / name.replace("0631", "0601.tif"))
    layer = "s2" if name.startswith("S2") else "s2.masks.cloud"
    message = rf"1 images of rasters\.{layer} have a date .* not in the calendar, the first: {name}\.tif; fix the name"
    with pytest.raises(DatasetError, match=message) as error:
        opened(tmp_path, tmp_path)
    assert "\n" not in str(error.value)


def test_an_area_keeps_the_tiles_whose_centre_it_contains(src, tmp_path):
    dataset = opened(src, tmp_path, DESCRIPTION, "grid.area=area.geojson")
    assert len(dataset.keys()) == 6
    fsspec.filesystem("memory").put(str(src / "area.geojson"), "/areas/area.geojson")
    there = opened(src, tmp_path, DESCRIPTION, "grid.area=memory://areas/area.geojson")
    assert there.keys() == dataset.keys()


def test_the_digest_of_settings_stays_that_of_shards_which_are_there(tmp_path):
    description = described(tmp_path, DESCRIPTION + LABELS, "grid.area=a.geojson")
    assert settings_of(description) == "53eb72a2b90ab4cf8b886663bad297b6d0f0a97aa10f9bfea53bc84cef9e0a74"
    other = described(tmp_path, DESCRIPTION + LABELS, "grid.area={file: a.geojson, crs: 'EPSG:4326'}")
    assert settings_of(other) != settings_of(description)


def test_blocks_split_the_tiles_at_a_distance(src, tmp_path):
    tiles = {}
    for split in ("train", "val", "test"):
        dataset = opened(src, tmp_path, DESCRIPTION + BLOCKS, split=split)
        tiles[split] = dataset.keys()
        assert sum(dataset.left_out.values()) < 60
    assert all(tiles.values())
    with pytest.raises(DatasetError, match="has no split 'tst' \\(did you mean 'test'"):
        opened(src, tmp_path, DESCRIPTION + BLOCKS, split="tst")


def test_tiles_with_few_valid_pixels_are_left_out(src, tmp_path):
    dataset = opened(src, tmp_path, DESCRIPTION, "rasters.s2.valid=[6000,null]")
    with pytest.raises(LeftOut, match="s2 has no image with enough valid pixels"):
        dataset.read(dataset.keys()[0])


def test_pixels_that_a_mask_marks_as_nodata_do_not_count_as_covered(src, tmp_path):
    text = DESCRIPTION.replace("masks: {cloud:", "masks: {nodata:").replace("classes: [9]", "classes: [4, 9]")
    dataset = opened(src, tmp_path, text)
    with pytest.raises(LeftOut, match="s2 has no image with enough valid pixels"):
        dataset.read(dataset.keys()[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid.crs=EPSG:4326"], r"grid.crs: WGS 84 is in degree, .* for example EPSG:32631 \(the UTM zone"),
        (["grid.crs=EPSG:2154x"], "grid.crs: 'EPSG:2154x' is not a coordinate reference system"),
        (["grid.area=far.geojson"], "far.geojson: lies outside of all scenes: it covers"),
        (["grid.area=none.gpkg"], "none.gpkg: cannot be read"),
        (["rasters.dem.files=far.tif"], "rasters s2 and dem do not overlap"),
        (
            ["rasters.dem.files=bare.tif"],
            r"1 images of rasters.dem have no coordinate system, the first: bare.tif; set rasters.dem.crs",
        ),
        (["rasters.dem.files=local.tif"], "1 images of rasters.dem are in a local coordinate system"),
        (["rasters.s2.files=S?_{tile}_{date:%Y%m%d}.tif"], "no file matches"),
        (["rasters.s2.window=[0,0]"], "rasters.s2.window: excludes grid"),
        (["grid.stride_m=6000", "grid.origin=[100,100]"], "no tile of 320 m is covered by the images"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(src, tmp_path, overrides, message):
    far = shapely.box(0, 40, 0.1, 40.1)
    geopandas.GeoDataFrame(geometry=[far], crs=4326).to_file(src / "far.geojson", driver="GeoJSON")
    write_scene(src / "far.tif", np.ones((1, 64, 64), "float32"), 100_000, 100_000, 20.0)
    write_scene(src / "bare.tif", np.ones((1, 64, 64), "float32"), WEST, NORTH, 20.0, crs=None)
    local = 'LOCAL_CS["of a drawing",UNIT["metre",1]]'
    write_scene(src / "local.tif", np.ones((1, 64, 64), "float32"), WEST, NORTH, 20.0, crs=local)
    with pytest.raises(DatasetError, match=message) as caught:
        opened(src, tmp_path, DESCRIPTION, *overrides)
    assert "\n" not in str(caught.value)


def test_labels_that_lie_elsewhere_are_refused(src, tmp_path):
    elsewhere = shapely.box(WEST + 100_000, NORTH - 100, WEST + 100_100, NORTH)
    frame = geopandas.GeoDataFrame({"kind": ["forest"], "height": [1.0]}, geometry=[elsewhere], crs=CRS)
    frame.to_file(src / "elsewhere.gpkg", driver="GPKG")
    change = "targets.cover.vector.files=elsewhere.gpkg"
    with pytest.raises(
        DatasetError, match=r"elsewhere\.gpkg: no feature lies where the images are, so cover would"
    ):
        opened(src, tmp_path, DESCRIPTION + LABELS, change)

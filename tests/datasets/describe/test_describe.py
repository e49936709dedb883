"""Drafts of folders in the styles that people have, and what ``shard`` makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import geopandas
import numpy as np
import pyproj
import pytest
import rasterio
import webdataset as wds
import xarray
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from shapely.geometry import box
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.datasets.describe import describe
from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.dataset import open_described
from maestro_scale.datasets.description.load import load_description
from maestro_scale.datasets.spec import DatasetError

WEST, NORTH = 600_000, 5_400_000
DAYS = ("20220603", "20220618")


def write(
    path: Path, shape, low=400, high=3000, dtype="uint16", m=10.0, west=WEST, names=(), **profile
) -> None:
    """A GeoTIFF with values from ``low`` to below ``high``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = shape
    values = np.random.default_rng(len(path.name)).integers(low, high, shape).astype(dtype)
    alpha = count == 4 and dtype == "uint8"
    if alpha:
        values[3] = 255
    place = {"crs": "EPSG:32632", "transform": from_origin(west, NORTH, m, m)}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=dtype,
        **{**place, **profile},
    ) as file:
        file.write(values)
        if names:
            file.descriptions = names
        if alpha:
            file.colorinterp = [*file.colorinterp[:3], ColorInterp.alpha]


def drafted(folder: Path, tmp_path: Path, **options) -> Description:
    """The description that the draft of a folder is; the same text twice."""
    text = describe(str(folder), **options).to_yaml()
    assert describe(str(folder), **options).to_yaml() == text
    path = tmp_path / "draft.yaml"
    path.write_text(text)
    return load_description(path)


def first_tile(description: Description, folder: Path, split: str = "train"):
    dataset = open_described(description, str(folder), split)
    return dataset.read(dataset.keys()[0])


def test_sentinel_2_bands_in_files_of_two_resolutions(tmp_path):
    src = tmp_path / "s2"
    for day in DAYS:
        name = f"S2B_MSIL2A_{day}T102559_N0400_R108_T32UMD_{day}T130000.SAFE/IMG_DATA"
        for m, bands in ((10, ("B02", "B03", "B04", "B08")), (20, ("B02", "B05", "B8A", "B11"))):
            for band in bands:
                write(
                    src / name / f"R{m}m" / f"T32UMD_{day}T102559_{band}_{m}m.tif",
                    (1, 2560 // m, 2560 // m),
                    m=m,
                )
        scl = src / name / "R20m" / f"T32UMD_{day}T102559_SCL_20m.tif"
        write(scl, (1, 128, 128), 3, 9, "uint8", m=20)
        write(src / name / "R10m" / f"T32UMD_{day}T102559_TCI_10m.tif", (3, 256, 256), 0, 255, "uint8")
    description = drafted(src, tmp_path)
    s2 = description.rasters["s2"]
    assert [b.name for b in s2.bands] == ["B2", "B3", "B4", "B5", "B8", "B8A", "B11"]
    assert [b.from_ for b in s2.bands][3:5] == ["B05_20m", "B08_10m"]
    assert (s2.series, s2.resolution_m, s2.offset, s2.quantity) == (True, 10, -1000, "reflectance")
    assert s2.masks["cloud"].classes == (3, 8, 9, 10)
    assert s2.sensor.band_groups == (4, 2, 1)
    assert description.grid.crs == "EPSG:32632"
    tile = first_tile(description, src)
    assert tile.arrays["s2"].shape == (2, 7, 32, 32)
    assert tile.masks["s2"].any()


def test_landsat_products_with_bits_of_quality(tmp_path):
    src = tmp_path / "landsat"
    for platform, day in zip(("LC08", "LC09"), DAYS, strict=True):
        for band in ("SR_B2", "SR_B4", "SR_B5", "ST_B10", "QA_PIXEL"):
            path = src / f"{platform}_L2SP_196026_{day}_20220701_02_T1_{band}.TIF"
            write(path, (1, 240, 210), 8000, 20000, m=30, nodata=None if band == "QA_PIXEL" else 0)
    description = drafted(src, tmp_path)
    landsat = description.rasters["landsat"]
    assert [(b.name, b.from_) for b in landsat.bands] == [("L2", "SR_B2"), ("L4", "SR_B4"), ("L5", "SR_B5")]
    assert (landsat.scale, landsat.offset, landsat.dtype) == (0.275, -2000, "int16")
    assert landsat.masks["snow"].bits == (5,)
    values = first_tile(description, src).arrays["landsat"]
    assert -2000 < values.min() < values.max() < 4000


def test_a_photo_of_a_drone_with_trees_as_geojson(tmp_path):
    src = tmp_path / "drone"
    write(src / "orthomosaic.tif", (4, 600, 500), 20, 200, "uint8", m=0.05)
    trees = geopandas.GeoDataFrame(
        {"id": range(9), "species": ["oak", "pine", "oak"] * 3},
        geometry=[box(WEST + 2 * i, NORTH - 20, WEST + 2 * i + 1, NORTH - 2) for i in range(9)],
        crs="EPSG:32632",
    )
    trees.to_crs(4326).to_file(src / "trees.geojson", driver="GeoJSON")
    description = drafted(src, tmp_path, blocks=True)
    aerial, target = description.rasters["aerial"], description.targets["trees"]
    assert [b.name for b in aerial.bands] == ["R", "G", "B"]  # the fourth is alpha
    assert description.tile_m == pytest.approx(12.8)
    assert (target.vector.column, target.classes) == ("species", ("oak", "pine", "unlabelled"))
    assert description.splits.blocks.fractions == {"train": 0.7, "val": 0.15, "test": 0.15}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["fields.shp", "fields.parquet"])
def test_labels_without_a_coordinate_system_get_that_of_the_images(tmp_path, name):
    src = tmp_path / "d"
    write(src / "orthomosaic.tif", (3, 600, 500), 20, 200, "uint8", m=0.5)
    shapes = [box(WEST + 50 * i, NORTH - 290, WEST + 50 * i + 30, NORTH - 2) for i in range(4)]
    fields = geopandas.GeoDataFrame({"crop": ["rye", "oats"] * 2}, geometry=shapes)
    (fields.to_parquet if name.endswith("parquet") else fields.to_file)(src / name)
    description = drafted(src, tmp_path)
    assert description.targets["fields"].vector.crs == "EPSG:32632"
    assert "assumed: crs is that of the images, since the file declares none" in describe(str(src)).to_yaml()
    assert (first_tile(description, src).targets["fields"] < 2).any()


def test_a_series_in_folders_of_dates_with_an_area(tmp_path):
    src = tmp_path / "planet"
    for day in ("2021-06-03", "2021-07-03"):
        write(src / day / "site_4band.tif", (4, 300, 400), m=3, nodata=0)
        write(src / day / "site_udm2.tif", (8, 300, 400), 0, 2, "uint8", m=3)
    area = geopandas.GeoDataFrame(geometry=[box(WEST, NORTH - 500, WEST + 900, NORTH)], crs="EPSG:32632")
    area.to_file(src / "aoi.gpkg")
    description = drafted(src, tmp_path)
    (raster,) = description.rasters.values()
    assert [b.name for b in raster.bands] == ["B", "G", "R", "NIR"]
    assert raster.files == "{date:%Y-%m-%d}/site_4band.tif"
    assert raster.masks["cloud"].invert
    assert description.grid.area.file == "aoi.gpkg"
    assert first_tile(description, src).arrays["site"].shape[:2] == (2, 4)


def test_tiles_in_folders_of_splits_with_masks(tmp_path):
    src = tmp_path / "tiles"
    for split in ("train", "valid"):
        for k in "ab":
            write(src / split / "images" / f"img_{split}{k}.tif", (3, 64, 64), 0, 255, "uint8", m=0.5)
            write(src / split / "masks" / f"img_{split}{k}.tif", (1, 64, 64), 0, 3, "uint8", m=0.5)
    description = drafted(src, tmp_path)
    assert (description.tile_m, description.grid) == (32, None)
    (target,) = description.targets.values()
    assert target.classes == ("class_0", "class_1", "class_2")
    assert description.splits.names == {"val": ("valid",)}
    assert first_tile(description, src, "val").key == "valida"


def test_tiles_of_several_sensors_with_a_table(tmp_path):
    src = tmp_path / "plots"
    rows = ["plot,split,species,biomass"]
    for k in range(6):
        for day in DAYS:
            write(src / "sentinel2" / f"plot_{k}_{day}.tif", (10, 32, 32))
        write(src / "dem" / f"plot_{k}.tif", (1, 32, 32), 200, 300, "float32", nodata=-9999)
        rows.append(f"plot_{k},{('train', 'test')[k % 2]},{('oak', 'pine')[k // 3]},{50.5 + k}")
    (src / "plots.csv").write_text("\n".join(rows))
    description = drafted(src, tmp_path)
    assert list(description.rasters) == ["s2", "dem"]
    assert description.targets["species"].classes == ("oak", "pine")
    assert description.targets["biomass"].kind == "regression"
    tile = first_tile(description, src, "test")
    assert tile.key == "plot_1"
    assert tile.targets["biomass"] == pytest.approx(51.5)


def test_a_mask_beside_its_image_is_not_another_tile(tmp_path):
    src = tmp_path / "beside"
    for k in "123":
        write(src / f"tile_{k}.tif", (3, 64, 64), 0, 255, "uint8", m=0.5)
        write(src / f"tile_{k}_mask.tif", (1, 64, 64), 0, 2, "uint8", m=0.5)
    description = drafted(src, tmp_path)
    assert open_described(description, str(src), "train").keys() == ["1", "2", "3"]
    assert description.targets["mask"].raster.files == "tile_{key}_mask.tif"


def test_folders_of_classes(tmp_path):
    src = tmp_path / "eurosat"
    for name in ("Forest", "River"):
        for k in (1, 2):
            write(src / name / f"{name}_{k}.tif", (13, 64, 64))
    description = drafted(src, tmp_path)
    assert description.targets["class"].classes == ("Forest", "River")
    assert first_tile(description, src).targets["class"] == 0


def test_a_cube_per_tile_in_netcdf(tmp_path):
    src = tmp_path / "cubes"
    src.mkdir()
    rng = np.random.default_rng(0)
    for k in range(2):
        xarray.Dataset(
            {
                "s2": (("time", "band", "y", "x"), rng.uniform(0, 0.6, (3, 4, 32, 32)).astype("float32")),
                "label": (("y", "x"), rng.integers(0, 3, (32, 32), "uint8")),
            },
            coords={
                "time": np.array(["2021-01-05", "2021-02-05", "2021-03-05"], "datetime64[ns]"),
                "x": WEST + 10 * np.arange(32.0),
                "y": NORTH - 10 * np.arange(32.0),
            },
        ).to_netcdf(src / f"cube_{k}.nc", engine="h5netcdf")
    description = drafted(src, tmp_path)
    s2 = description.rasters["s2"]
    assert (s2.variable, s2.axes, s2.resolution_m) == ("s2", ("date", "band", "y", "x"), 10)
    tile = first_tile(description, src)
    assert tile.dates["s2"].tolist() == [[2021, 5, 0], [2021, 36, 0], [2021, 64, 0]]
    assert tile.targets["label"].shape == (32, 32)


def test_a_cube_of_one_place_is_cut_into_tiles(tmp_path):
    values = np.arange(2 * 96 * 80, dtype="int16").reshape(2, 96, 80)
    cube = xarray.Dataset(
        {band: (("time", "y", "x"), values + i) for i, band in enumerate(("B02", "B03"))},
        coords={
            "time": np.array(["2021-01-05", "2021-02-05"], "datetime64[ns]"),
            "x": WEST + 5 + 10 * np.arange(80.0),
            "y": NORTH - 5 - 10 * np.arange(96.0)[::-1],  # from south to north
            "spatial_ref": ((), 0, pyproj.CRS.from_epsg(32632).to_cf()),
        },
    )
    (tmp_path / "d").mkdir()
    cube.to_netcdf(tmp_path / "d" / "cube.nc", engine="h5netcdf")
    description = drafted(tmp_path / "d", tmp_path)
    assert description.grid.crs == "EPSG:32632"
    dataset = open_described(description, str(tmp_path / "d"), "train")
    size = round(description.tile_m / 10)
    tile = dataset.read(f"32632_E{WEST:07d}_N{NORTH:07d}")
    np.testing.assert_array_equal(tile.arrays["band"][1, 1], values[1, ::-1][:size, :size] + 1)


@pytest.mark.parametrize("crs", ["EPSG:32632", None])
def test_small_images_of_one_place(tmp_path, crs):
    place = {} if crs else {"crs": None, "transform": rasterio.Affine.identity()}
    for day in DAYS:
        write(tmp_path / "d" / f"image_{day}.tif", (4, 64, 64), **place)
        write(tmp_path / "d" / f"labels_{day}.tif", (1, 64, 64), 0, 3, "uint8", **place)
    for day in DAYS[1:]:
        (tmp_path / "d" / f"labels_{day}.tif").unlink()
    (tmp_path / "d" / f"labels_{DAYS[0]}.tif").rename(tmp_path / "d" / "labels.tif")
    description = drafted(tmp_path / "d", tmp_path)
    assert (description.grid is not None) == (crs is not None)
    tile = first_tile(description, tmp_path / "d")
    assert len(tile.arrays["image"]) == 2
    assert tile.targets["labels"].ndim == 2


def test_scenes_in_web_mercator_get_a_grid_and_pixels_of_the_ground(tmp_path):
    """At 60° N, 20 m in Web Mercator are 10 m."""
    place = {"crs": "EPSG:3857", "transform": rasterio.Affine(20, 0, 1e6, 0, -20, 8.4e6)}
    write(tmp_path / "d" / "s2_20220603.tif", (4, 256, 256), **place)
    description = drafted(tmp_path / "d", tmp_path)
    assert description.grid.crs == "EPSG:32632"
    assert description.rasters["s2"].resolution_m == pytest.approx(10, rel=0.02)
    assert first_tile(description, tmp_path / "d").origin.crs == "EPSG:32632"


def test_tiles_with_one_map_of_labels_are_scenes(tmp_path):
    for k in range(3):
        write(tmp_path / "d" / f"image_{k}.tif", (4, 64, 64), west=WEST + 640 * k)
    write(tmp_path / "d" / "landcover.tif", (1, 64, 192), 0, 3, "uint8")
    description = drafted(tmp_path / "d", tmp_path)
    assert description.grid is not None
    assert "landcover" in first_tile(description, tmp_path / "d").targets


def test_harmonised_landsat_and_sentinel_are_two_rasters(tmp_path):
    for product, infrared in (("S30", "B8A"), ("L30", "B05")):
        for day in ("2022153", "2022169"):
            for band in ("B02", "B03", "B04", infrared, "Fmask"):
                path = tmp_path / "d" / f"HLS.{product}.T32UQD.{day}T102021.v2.0.{band}.tif"
                kind = (0, 2, "uint8") if band == "Fmask" else (1000, 3000, "int16")
                write(path, (1, 64, 64), *kind, m=30)
    description = drafted(tmp_path / "d", tmp_path)
    s2, landsat = description.rasters["s2"], description.rasters["landsat"]
    assert [b.name for b in s2.bands] == ["B2", "B3", "B4", "B8A"]
    assert [b.name for b in landsat.bands] == ["L2", "L3", "L4", "L5"]
    assert (s2.quantity, landsat.quantity, s2.offset) == ("reflectance", "reflectance", 0)
    assert first_tile(description, tmp_path / "d").dates["s2"].tolist() == [[2022, 153, 10], [2022, 169, 10]]


@pytest.mark.parametrize(
    ("baselines", "offset", "said"),
    [
        (("N0500", "N0500"), -1000, "processing baseline N0500 adds 1000"),
        (("N0214", "N0300"), 0, ""),
        (
            ("N0300", "N0510"),
            -1000,
            "N0510 adds 1000, not to N0300: put these images into a raster of their own",
        ),
    ],
)
def test_the_baseline_of_a_product_says_whether_1000_was_added(tmp_path, baselines, offset, said):
    for day, baseline in zip(("20190603", "20190613"), baselines, strict=True):
        name = f"S2A_MSIL2A_{day}T102021_{baseline}_R065_T32UQD_{day}T150000.SAFE"
        for band in ("B02", "B03", "B04"):
            write(tmp_path / "d" / name / f"T32UQD_{day}T102021_{band}_10m.tif", (1, 64, 64), 1200)
    assert drafted(tmp_path / "d", tmp_path).rasters["s2"].offset == offset
    assert said in " ".join((tmp_path / "draft.yaml").read_text().replace("#", " ").split())


def test_labels_and_dates_of_tars_are_proposed(tmp_path):
    def npy(number: int) -> bytes:
        file = io.BytesIO()
        np.save(file, np.full((4, 32, 32), 500 + number, "uint16"))
        return file.getvalue()

    (tmp_path / "d").mkdir()
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / "d" / f"train-{shard:03d}.tar"), encoder=False) as tar:
            for i in range(8):
                acquired = {
                    "processed": "2022-01-01",
                    "properties": {"datetime": f"2020-06-{i + 1:02d}T10:00:00Z"},
                }
                document = json.dumps({**acquired, "crop": ["rye", "oats"][i % 2]}).encode()
                texts = {"cls": b"%d" % (i % 3), "json": document} if i else {"json": document}
                tar.write({"__key__": f"t{shard}{i}", "s2.npy": npy(i), **texts})
    description = drafted(tmp_path / "d", tmp_path)
    target = description.targets["cls"]
    assert (target.kind, target.classes) == ("classification", ("class_0", "class_1", "class_2"))
    dataset = open_described(description, str(tmp_path / "d"), "train")
    tile = dataset.read("t15")
    assert (tile.targets["cls"].tolist(), tile.dates["s2"].tolist()) == ([2], [[2020, 158, 10]])
    assert dataset.read("t10").targets["cls"].tolist() == [-1]  # no member


def test_the_command_prints_yaml_alone_and_messages_elsewhere(tmp_path):
    for k in range(3):
        write(tmp_path / "d" / f"a_{k}.tif", (3, 64, 64), 0, 255, "uint8")
    (tmp_path / "d" / "a_1.tif").write_bytes(b"II*\x00 damaged")
    done = CliRunner().invoke(app, ["describe", str(tmp_path / "d")])
    assert done.exit_code == 0
    assert "name: d" in done.stdout
    assert done.stdout.startswith("# A first draft")
    assert "damaged" not in done.stdout
    assert "warning: a_1.tif: cannot be read" in done.stderr
    assert "maestro-scale shard MY.yaml" in done.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it is empty"),
        ({"notes.txt": b"-"}, "holds no images that could be described"),
        ({"a.tif": b"II*\x00 damaged"}, "none of 1 images can be read"),
    ],
)
def test_a_folder_with_nothing_usable_is_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        describe(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_hostile_names_stay_within_their_comments_and_values(tmp_path):
    name = 'x"\n# y: ${HOME} {key} *'
    for k in "ab":
        write(tmp_path / "d" / name / f"{k}.tif", (3, 64, 64), 0, 255, "uint8")
    description = drafted(tmp_path / "d", tmp_path)
    assert open_described(description, str(tmp_path / "d"), "train").keys() == ["a", "b"]


def test_the_items_of_a_stac_file(tmp_path):
    src = tmp_path / "stac"
    features = []
    for day in DAYS:
        assets = {}
        for band in ("B02", "B04", "B08", "scl"):
            low, high, dtype = (3, 9, "uint8") if band == "scl" else (400, 3000, "uint16")
            write(src / "assets" / f"{day}_{band}.tif", (1, 256, 256), low, high, dtype)
            assets[band] = {"href": f"./assets/{day}_{band}.tif"}
        date = f"{day[:4]}-{day[4:6]}-{day[6:]}T10:30:21Z"
        features.append(
            {
                "type": "Feature",
                "stac_version": "1.0.0",
                "id": day,
                "geometry": None,
                "links": [],
                "properties": {"datetime": date, "platform": "sentinel-2b"},
                "assets": assets,
            }
        )
    (src / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    draft = describe(str(src / "items.json"))
    assert draft.source == str(src)
    path = tmp_path / "draft.yaml"
    path.write_text(draft.to_yaml())
    description = load_description(path)
    s2 = description.rasters["s2"]
    assert (s2.files, s2.source, s2.series) == ("items.json", "stac", True)
    assert [b.from_ for b in s2.bands] == ["B02", "B04", "B08"]
    tile = first_tile(description, src)
    assert tile.dates["s2"].tolist() == [[2022, 154, 10], [2022, 169, 10]]
    assert tile.masks["s2"].any()

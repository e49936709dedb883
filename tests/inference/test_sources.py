"""What ``maestro-scale predict`` reads: folders of official layouts, scenes of a STAC catalog, an area of interest."""

from __future__ import annotations

import datetime
import json

import geopandas
import numpy as np
import pystac
import pytest
import rasterio
import shapely
import torch
from rasterio.features import geometry_mask
from testkit.models import TINY
from testkit.scene_files import write_scene
from testkit.valley import CRS, DESCRIPTION, NORTH, WEST, landscape

from maestro_scale import datasets
from maestro_scale.inference.command import Options, predict
from maestro_scale.inference.run import Run
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.write.writer import write_shards

CPU = Run(torch.device("cpu"))


@pytest.mark.parametrize(("name", "side", "num_windows"), [("flair_hub", 512, 1), ("pastis_hd", 128, 64)])
def test_a_folder_of_an_official_layout_gives_the_maps_of_its_shards(tmp_path, name, side, num_windows):
    datasets.synth(name, tmp_path / "raw", 1, 0)
    raw = datasets.open_raw(name, tmp_path / "raw", "train")
    target = next(t for t in raw.spec.targets if t.kind == "segmentation")
    config = ModelConfig(
        raw.spec.sensors,
        TINY,
        raw.spec.pos_grid,
        inter_depth=1,
        ref_sensor=raw.spec.ref_sensor,
        heads=(target,),
        crop_m=raw.spec.crop_m,
        dataset=name,
    )
    model = Maestro(config, decodes=False).initialise(0)
    model.finetuned = Finetuned(raw.spec, target.name, "miou", "finetune", 1, 0.5, 0.5)
    options = Options(splits=("train",), overlap=0.0, cache_dir=tmp_path / "cache")
    done, notes = predict(model, str(tmp_path / "raw"), tmp_path / "of files", options, CPU)
    assert (done, notes) == (num_windows, [])
    write_shards(raw, str(tmp_path / "shards"), "train", workers=1, codec="raw")
    predict(model, str(tmp_path / "shards"), tmp_path / "of shards", options, CPU)
    (key,) = raw.keys()
    (path,) = (tmp_path / "of files").glob("*.tif")
    assert path.name == f"{key}.tif"
    assert path.read_bytes() == (tmp_path / "of shards" / path.name).read_bytes()
    origin = raw.read(key).origin
    with rasterio.open(path) as image:
        assert (image.shape, image.crs.to_string()) == ((side, side), "EPSG:2154")
        assert (image.bounds.left, image.bounds.top) == (origin.west_m, origin.north_m)
        found = np.unique(image.read(1)).tolist()
    assert set(found) <= {i for i in range(len(target.classes)) if i not in target.ignored}


def test_scenes_of_a_stac_catalog_within_an_area_of_interest(model, valley, tmp_path):
    when = datetime.datetime(2020, 6, 1, 10, tzinfo=datetime.timezone.utc)
    item = pystac.Item("scene", {"type": "Point", "coordinates": [3, 45]}, [3, 45, 3, 45], when, {})
    item.add_asset("pixels", pystac.Asset("scene/s2_20200601.tif"))
    (tmp_path / "scene").symlink_to(valley.scene)
    (tmp_path / "items.json").write_text(json.dumps(pystac.ItemCollection([item]).to_dict()))
    of_stac = DESCRIPTION.replace(
        '"s2_{date:%Y%m%d}.tif"', "items.json\n    variable: pixels\n    source: stac"
    )
    (tmp_path / "stac.yaml").write_text(
        of_stac.replace("[B2, B3, B4]", "[{name: B2, from: 1}, {name: B3, from: 2}, {name: B4, from: 3}]")
    )
    # A triangle, in longitude and latitude, with its right angle at the upper left corner of the scene.
    triangle = shapely.Polygon([(WEST, NORTH), (WEST + 800, NORTH), (WEST, NORTH - 640)])
    geopandas.GeoDataFrame(geometry=[triangle], crs=CRS).to_crs(4326).to_file(tmp_path / "area.gpkg")
    area = ("grid.area=area.gpkg",)
    predict(model, str(tmp_path / "stac.yaml"), tmp_path / "cut", Options(overrides=area), CPU)
    files = Options(files=str(valley.scene))
    predict(model, str(valley.description), tmp_path / "whole", files, CPU)
    with (
        rasterio.open(tmp_path / "cut" / "valley.tif") as cut,
        rasterio.open(tmp_path / "whole" / "valley.tif") as whole,
    ):
        found = cut.read(1)
        inside = ~geometry_mask([triangle], cut.shape, cut.transform)
        row, column = ((whole.bounds.top - cut.bounds.top) / 10, (cut.bounds.left - whole.bounds.left) / 10)
        expected = whole.read(1)[round(row) :, round(column) :][: cut.height, : cut.width]
    assert ((found != 255) == inside).all()
    assert inside.sum() == pytest.approx(80 * 64 / 2, rel=0.01)
    deep = inside & (np.add.outer(np.arange(cut.height) / 64, np.arange(cut.width) / 80) < 0.7)
    assert (found == expected)[deep].mean() > 0.99


def test_maps_without_a_place_are_noted(model, tmp_path):
    values = landscape(16, 0)[0]
    write_scene(tmp_path / "a_20200601.tif", values, 2.99, 45.1, 1e-4, crs="EPSG:4326", nodata=0)
    text = DESCRIPTION.replace("grid: {}\n", "").replace("s2_{date", "{key}_{date").replace("480", "160")
    (tmp_path / "tiles.yaml").write_text(text)
    for name, options in (("maps", Options()), ("tiles of the table", Options(embeddings="parquet"))):
        _, (note,) = predict(model, str(tmp_path / "tiles.yaml"), tmp_path / name, options, CPU)
        assert note.startswith(f"1 {name} have no place and no CRS, because")
        assert note.endswith("; the first: a")


def test_a_scene_without_a_valid_pixel_is_noted(model, tmp_path):
    write_scene(tmp_path / "s2_20200601.tif", np.zeros((3, 16, 16), np.int16), WEST, NORTH, crs=CRS, nodata=0)
    (tmp_path / "valley.yaml").write_text(DESCRIPTION)
    _, (note,) = predict(model, str(tmp_path / "valley.yaml"), tmp_path / "maps", Options(), CPU)
    assert note.startswith("1 maps have no valid pixel: nothing is measured there")
    options = Options(embeddings="parquet")
    _, (note,) = predict(model, str(tmp_path / "valley.yaml"), tmp_path / "table", options, CPU)
    assert note.startswith("no window has a valid pixel")

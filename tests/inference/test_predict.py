"""``maestro-scale predict``: one map whatever the windows, ranks and kills; files that GIS programs understand."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import geopandas
import numpy as np
import pyarrow.parquet as parquet
import pytest
import rasterio
import torch
from rio_cogeo.cogeo import cog_validate
from testkit.hostile import NAMES
from testkit.models import TINY
from testkit.scene_files import write_scene
from testkit.valley import CLASSES, CRS, DESCRIPTION, NORTH, SIZE, SPEC, WEST, landscape, tile
from typer.testing import CliRunner

import maestro_scale
from maestro_scale.cli import app
from maestro_scale.datasets.cog import Bands, block_side, write_cog
from maestro_scale.datasets.description.load import load_description
from maestro_scale.datasets.spec import DatasetError, Target
from maestro_scale.escaping import file_name, printable
from maestro_scale.inference import run, windows
from maestro_scale.inference.command import (
    Data,
    Options,
    open_data,
    open_source,
    predict,
    view_on,
)
from maestro_scale.inference.errors import InferenceError
from maestro_scale.inference.folder import Folder
from maestro_scale.inference.source import Layout
from maestro_scale.interop.export import write_model
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.write.from_arrays import Raster, describe
from maestro_scale.shards.write.writer import Writer

CPU = run.Run(torch.device("cpu"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """{path: content} of what users see."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "_predict.json"
    }


def scene_map(model, valley, out: Path, **options) -> np.ndarray:
    """The classes of the scene's pixels."""
    predict(model, str(valley.description), out, Options(files=str(valley.scene), **options), CPU)
    with rasterio.open(out / "valley.tif") as image:
        row, column = round((image.bounds.top - NORTH) / 10), round((WEST - image.bounds.left) / 10)
        assert (image.crs.to_string(), image.res) == (CRS, (10.0, 10.0))
        return image.read(1)[row : row + SIZE, column : column + SIZE]


def test_a_map_of_a_scene_does_not_depend_on_the_offset_of_windows(model, valley, tmp_path):
    maps = {}
    for overlap in (0.0, 0.5):
        for offset in (0, 40):
            origin = (f"grid.origin=[{offset},{offset}]",)
            out = tmp_path / f"{overlap}-{offset}"
            maps[overlap, offset] = scene_map(model, valley, out, overlap=overlap, overrides=origin)
    assert all(set(np.unique(m)) == {0, 2, 3} for m in maps.values())  # no pixel without a class
    blended = (maps[0.5, 0] == maps[0.5, 40]).mean()
    apart = (maps[0.0, 0] == maps[0.0, 40]).mean()
    assert blended >= 0.995
    assert 1 - apart > 1.5 * (1 - blended)
    scores = {k: (m == valley.truth).mean() for k, m in maps.items()}
    assert min(scores[0.5, 0], scores[0.5, 40]) >= max(scores[0.0, 0], scores[0.0, 40])


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 pixels, so that the scene has 16."""
    monkeypatch.setattr(windows, "BLOCK", 32)
    return replace(CPU, memory_bytes=1, batch_size=5)


def test_ranks_and_kills_write_the_same_bytes(model, valley, tmp_path, small_chunks):
    options = Options(files=str(valley.scene), probabilities=True)

    def run_rank(out, rank=0, world=1, progress=None):
        how = replace(small_chunks, rank=rank, world=world)
        return predict(model, str(valley.description), out, options, how, progress)[0]

    total = run_rank(tmp_path / "alone")
    expected = bytes_of(tmp_path / "alone")
    assert set(expected) == {"valley.tif", "valley.tif.aux.xml", "probabilities/valley.tif"}
    # Rank 0 puts the map together, once the others have written their parts.
    shares = [run_rank(tmp_path / "shared", rank, 3) for rank in (1, 2, 0)]
    assert sum(shares) == total
    assert min(shares) > total / 5
    assert bytes_of(tmp_path / "shared") == expected

    class Killed(Exception):
        pass

    def kill(done, *_):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        run_rank(tmp_path / "killed", progress=kill)
    (tmp_path / "killed" / ".parts" / ".partial-1").write_bytes(b"half")
    assert 0 < run_rank(tmp_path / "killed") < total
    assert bytes_of(tmp_path / "killed") == expected
    assert run_rank(tmp_path / "killed") == 0
    # Chunks make no difference, but for what rounding may do where two classes are equally likely.
    predict(model, str(valley.description), tmp_path / "whole", options, CPU)
    with (
        rasterio.open(tmp_path / "whole" / "valley.tif") as one,
        rasterio.open(tmp_path / "alone" / "valley.tif") as other,
    ):
        assert (one.read() == other.read()).mean() > 0.999


def test_files_of_killed_jobs_are_removed_a_day_later(tmp_path):
    parts = Folder(tmp_path, {"model": "a"}).path / ".parts"
    old, new, part = (parts / name for name in (".partial-old", ".partial-new", "000000-000001.bin"))
    for file in (old, new, part):
        file.write_bytes(b"half")
        os.utime(file, (0, time.time() - (3600 if file is new else 90_000)))
    folder = Folder(tmp_path, {"model": "a"})
    assert [file.exists() for file in (old, new, part)] == [False, True, True]
    folder.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["_predict.json"]


def test_tiles_of_shards_are_maps_with_colours_and_names(model, valley, tmp_path):
    options = Options(probabilities=True, cache_dir=tmp_path / "cache")
    whole = tmp_path / "out"
    # Three tiles of 48 pixels; windows of 16 pixels begin at 0, 7, 14, 21, 28 and 32.
    assert predict(model, str(valley.shards), whole, options, CPU)[0] == 3 * 36
    names = {key: file_name(key, ".tif") for key in ("a/b", "../c", "d")}
    assert {p.name for p in whole.glob("*.tif")} == set(names.values())
    for number, (key, name) in enumerate(names.items()):
        for path in (whole / name, whole / "probabilities" / name):
            assert cog_validate(path, strict=True, quiet=True)[:3] == (True, [], [])
        with rasterio.open(whole / name) as image:
            classes = image.read(1)
            colours = image.colormap(1)
            assert (image.count, image.dtypes[0], image.nodata, image.crs.to_string()) == (
                1,
                "uint8",
                255,
                CRS,
            )
            assert image.bounds.left == WEST + 1000 * number
            assert image.tags()["key"] == key
            assert image.tags(1) == {"class_0": "field", "class_2": "wood", "class_3": "lake"}
            assert image.colorinterp[0].name == "palette"
        assert len({colours[v] for v in (0, 2, 3)}) == 3
        truth = landscape(48, 10 + number)[1]
        assert (classes == truth).mean() > 0.95
        xml = ElementTree.parse(whole / f"{name}.aux.xml")
        assert [c.text for c in xml.iter("Category")] == ["field", None, "wood", "lake"]
        assert [[f.text for f in row][:2] for row in xml.iter("Row")] == [
            ["0", "field"],
            ["2", "wood"],
            ["3", "lake"],
        ]
        with rasterio.open(whole / "probabilities" / name) as image:
            shares = image.read()
            assert image.descriptions == ("field", "wood", "lake")
            assert image.scales == (0.004,) * 3
            assert (image.nodata, image.crs.to_string()) == (255, CRS)
        assert np.abs(shares.sum(axis=0, dtype=int) - 250).max() <= 2
        assert (np.array([0, 2, 3])[shares.argmax(axis=0)] == classes).mean() > 0.99
    # Several ranks have batches of the same windows.
    for rank in (1, 0):
        predict(model, str(valley.shards), tmp_path / "shared", options, replace(CPU, rank=rank, world=2))
    assert bytes_of(tmp_path / "shared") == bytes_of(whole)
    (whole / names["d"]).unlink()
    assert predict(model, str(valley.shards), whole, options, CPU)[0] > 0
    assert bytes_of(tmp_path / "shared") == bytes_of(whole)


def test_names_from_data_stay_in_the_folder(model, tmp_path):
    pixels, truth = landscape(48, 0)
    with Writer(str(tmp_path / "shards"), SPEC, "test") as writer:
        for number, key in enumerate(NAMES):
            writer.add(tile(key, pixels, truth, number))
    options = Options(cache_dir=tmp_path / "cache", overlap=0.0)
    predict(model, str(tmp_path / "shards"), tmp_path / "out", options, CPU)
    found = sorted((tmp_path / "out").rglob("*.tif"))
    assert len(found) == len(NAMES)
    tags = set()
    for path in found:
        with rasterio.open(path) as image:
            tags.add(image.tags()["key"])
    assert tags == {printable(name) for name in NAMES}
    assert {p.name for p in tmp_path.iterdir()} == {"shards", "cache", "out"}


def test_where_nothing_is_measured_there_is_no_class(model, valley, tmp_path):
    scene = tmp_path / "scene" / "s2_20200601.tif"
    scene.parent.mkdir()
    with rasterio.open(valley.scene / "s2_20200601.tif") as image:
        profile, pixels = image.profile, image.read()
    pixels[:, 30:60, :20] = 0
    with rasterio.open(scene, "w", **profile) as image:
        image.write(pixels)
    area = {"type": "Polygon", "coordinates": [_ring(WEST, NORTH - 600, WEST + 600, NORTH)]}
    (tmp_path / "scene" / "area.geojson").write_text(
        json.dumps(
            {
                "type": "FeatureCollection",
                "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32631"}},
                "features": [{"type": "Feature", "properties": {}, "geometry": area}],
            }
        )
    )
    found = replace(valley, scene=scene.parent)
    classes = scene_map(model, found, tmp_path / "out")
    expected = np.zeros(classes.shape, bool)
    expected[30:60, :20] = True
    assert ((classes == 255) == expected).all()
    cut = ("grid.area=area.geojson",)
    with pytest.raises(InferenceError, match="something else"):
        scene_map(model, found, tmp_path / "out", overrides=cut)
    classes = scene_map(model, found, tmp_path / "cut", overrides=cut)
    expected[:60, :60] |= False
    assert (classes[:60, :60] != 255).sum() == 3600 - 600
    assert classes.shape == (min(SIZE, classes.shape[0]), classes.shape[1])
    assert (classes[60:] == 255).all()
    assert (classes[:, 60:] == 255).all()


def _ring(west, south, east, north):
    return [[west, south], [east, south], [east, north], [west, north], [west, south]]


def write_finetuned(folder: Path, target: Target) -> Maestro:
    """A model with random weights and a head for a target."""
    spec = replace(SPEC, targets=(target,))
    config = ModelConfig(
        spec.sensors,
        TINY,
        spec.pos_grid,
        inter_depth=1,
        ref_sensor="s2",
        heads=spec.targets,
        crop_m=160.0,
        dataset="valley",
    )
    state = Maestro(config, decodes=False).initialise(0).state_dict()
    write_model(
        folder, state, config, {"step": 1}, Finetuned(spec, target.name, "r2", "finetune", 1, 0.5, 0.5)
    )
    return load_model(folder)


def test_numbers_have_units(valley, tmp_path):
    model = write_finetuned(tmp_path / "model", Target("height", "regression", resolution_m=10.0, units="m"))
    options = Options(cache_dir=tmp_path / "cache")
    predict(model, str(valley.shards), tmp_path / "out", options, CPU)
    path = tmp_path / "out" / "d.tif"
    assert cog_validate(path, strict=True, quiet=True)[0]
    with rasterio.open(path) as image:
        assert (image.dtypes, image.units, image.descriptions) == (("float32",), ("m",), ("height",))
        assert np.isnan(image.nodata)
        assert np.isfinite(image.read()).all()
    with pytest.raises(InferenceError, match="--probabilities: height is regression"):
        predict(model, str(valley.shards), tmp_path / "p", replace(options, probabilities=True), CPU)


def test_the_overlap_is_that_of_the_finetuning(valley, tmp_path):
    model = load_model(valley.model)
    model.finetuned = replace(model.finetuned, overlap=0.25)
    options = Options(cache_dir=tmp_path / "cache", splits=("test",))
    strides = {}
    for name, chosen in (("maps", {}), ("half", {"overlap": 0.5}), ("points", {"embeddings": "parquet"})):
        predict(model, str(valley.shards), tmp_path / name, replace(options, **chosen), CPU)
        strides[name] = json.loads((tmp_path / name / "_predict.json").read_text())["stride_m"]
    # Of windows of 160 m, in whole pixels of 10 m, an odd number of them: a token is two pixels wide.
    assert strides == {"maps": 110, "half": 70, "points": 160}
    _, notes = predict(model, str(valley.shards), tmp_path / "most", replace(options, overlap=0.9), CPU)
    assert notes == []  # of 16 pixels: windows that begin at every pixel overlap by 15/16
    model.finetuned = replace(model.finetuned, spec=replace(model.finetuned.spec, crop_m=80.0))
    vectors = replace(options, overlap=0.9, embeddings="parquet")
    _, notes = predict(model, str(valley.shards), tmp_path / "less", vectors, CPU)
    assert notes == [
        "windows overlap by 0.88, not 0.9: they are 80 m wide, and begin at whole pixels of 10 m"
    ]  # 7/8
    with pytest.raises(InferenceError, match=r"--overlap 1: is a share of a window, from 0 to 0\.9"):
        predict(model, str(valley.shards), tmp_path / "one", replace(options, overlap=1.0), CPU)
    with pytest.raises(ValueError, match=r"overlap: 1 is not from 0 to 0\.9"):
        replace(model.finetuned, overlap=1.0)


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_labels_of_tiles_are_points(valley, tmp_path, kind):
    classes = () if kind == "regression" else ("a", "b", "c")
    model = write_finetuned(
        tmp_path / "model", Target("label", kind, classes, units="t" if kind == "regression" else "")
    )
    options = Options(cache_dir=tmp_path / "cache")
    for rank in (1, 0):
        predict(model, str(valley.shards), tmp_path / "out", options, replace(CPU, rank=rank, world=2))
    predict(model, str(valley.shards), tmp_path / "alone", options, CPU)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    frame = geopandas.read_parquet(tmp_path / "out" / "valley.parquet")
    assert len(frame) == 27  # nine windows per tile
    assert str(frame.crs.to_authority()) == "('OGC', 'CRS84')"
    there = frame.to_crs(CRS).geometry
    number = ("a/b", "../c", "d").index(frame.key[0])
    assert (round(there.x[0]), round(there.y[0])) == (WEST + 1000 * number + 80, NORTH - 80)
    assert list(frame.columns[:3]) == ["key", "first_date", "last_date"]
    assert str(frame.first_date[0]) == "2020-06-01"
    values = {"classification": "class", "multilabel": "classes", "regression": "value"}
    assert values[kind] in frame.columns
    assert kind != "regression" or set(frame.units) == {"t"}
    assert [c for c in frame.columns if c.startswith("p_")] == [f"p_{c}" for c in classes]


def test_embeddings_as_images_and_as_points(model, valley, tmp_path):
    options = Options(cache_dir=tmp_path / "cache", embeddings="cog", files=str(valley.scene))
    predict(model, str(valley.description), tmp_path / "cog", options, CPU)
    path = tmp_path / "cog" / "valley.tif"
    assert cog_validate(path, strict=True, quiet=True)[0]
    with rasterio.open(path) as image:
        assert (image.count, image.res, image.descriptions[1]) == (32, (20.0, 20.0), "s2_1")
        assert (image.crs.to_string(), set(image.dtypes)) == (CRS, {"float32"})
        assert np.isnan(image.nodata)
    points = replace(options, embeddings="parquet")
    predict(model, str(valley.shards), tmp_path / "points", replace(points, files=None), CPU)
    frame = geopandas.read_parquet(tmp_path / "points" / "valley.parquet")
    assert len(frame.vector[0]) == 32
    assert parquet.read_schema(tmp_path / "points" / "valley.parquet").field("vector").type.list_size == 32


def test_windows_in_which_nothing_is_measured_have_no_row(model, tmp_path):
    pixels, truth = landscape(48, 0)
    mask = np.zeros((1, 1, 48, 48), np.uint8)
    mask[..., :20, :] = 100  # all of the first row of windows, a part of the second
    with Writer(str(tmp_path / "shards"), SPEC, "test") as writer:
        made = tile("half", pixels, truth, 0)
        writer.add(replace(made, masks={"s2": mask}))
    options = Options(cache_dir=tmp_path / "cache", embeddings="parquet")
    predict(model, str(tmp_path / "shards"), tmp_path / "out", options, CPU)
    frame = geopandas.read_parquet(tmp_path / "out" / "valley.parquet")
    assert sorted(set(frame.y_m)) == [NORTH - 400, NORTH - 240]
    assert len(frame) == 6


def test_what_a_map_is_made_of_does_not_change_in_its_folder(model, valley, tmp_path):
    text = DESCRIPTION.replace("480", "960")
    scene = tmp_path / "s2_20200601.tif"
    scene.write_bytes((valley.scene / "s2_20200601.tif").read_bytes())

    def again(text: str) -> int:
        (tmp_path / "valley.yaml").write_text(text)
        return predict(model, str(tmp_path / "valley.yaml"), tmp_path / "out", Options(overlap=0.0), CPU)[0]

    assert again(text) > 0
    assert again(text.replace("name: valley", "name: valley\ntitle: The valley")) == 0
    for other in (
        text.replace("[B2, B3, B4]", "[{name: B2, from: 3}, {name: B3, from: 2}, {name: B4, from: 1}]"),
        text.replace("quantity: any", "quantity: any\n    resampling: cubic"),
        text.replace("quantity: any", "quantity: any\n    nodata: [700]"),
    ):
        with pytest.raises(InferenceError, match=r"something else \(description .* now "):
            again(other)
    scene.write_bytes(scene.read_bytes() + b"0")
    with pytest.raises(InferenceError, match=r"something else \(data "):
        again(text)


def test_an_array_of_another_dtype_gives_the_same(model):
    pixels, _ = landscape(16, 0)
    day = "2020-06-01"
    expected = model.predict(maestro_scale.tile({"s2": pixels}, day)).probabilities
    for values in (pixels.astype(np.uint16), pixels.astype(np.float64), pixels.tolist()):
        found = model.predict(maestro_scale.tile({"s2": values}, day)).probabilities
        assert torch.equal(found, expected)
    for wrong, message in (
        (pixels[:2], r"s2 is \(1, 2, 16, 16\); the model reads \(dates, 3, size, size\): B2, B3, B4"),
        (pixels[:, :8], r"s2 is \(1, 3, 8, 16\)"),
        (pixels[:, :8, :8], r"s2 covers 80 m \(8 pixels of 10 m\); the model reads 160 m"),
    ):
        with pytest.raises(DatasetError, match=message):
            model.predict(maestro_scale.tile({"s2": wrong}, day))


def test_tiles_of_a_description_and_of_a_dataset(model, valley, tmp_path):
    text = DESCRIPTION.replace("grid: {}\n", "").replace("s2_{date", "{key}_{date").replace("480", "960")
    (tmp_path / "tiles.yaml").write_text(text)
    options = Options(files=str(valley.scene), overlap=0.0)
    predict(model, str(tmp_path / "tiles.yaml"), tmp_path / "out", options, CPU)
    with rasterio.open(tmp_path / "out" / "s2.tif") as image:
        assert (image.read(1) == valley.truth).mean() > 0.95
    with pytest.raises(InferenceError, match="no reader for the model's dataset 'valley'"):
        predict(model, str(valley.scene), tmp_path / "none", Options(), CPU)


def test_offsets_move_the_windows_of_tiles(model, valley, tmp_path):
    options = Options(cache_dir=tmp_path / "cache")
    data = open_data(model, str(valley.shards), options)
    spec, notes = view_on(model, data.spec)
    assert (notes, spec.crop_m, spec.targets) == ([], 160.0, ())
    layout = Layout(10.0, 80.0)
    starts = [open_source(data, spec, layout, options, k).areas[0].tops.tolist() for k in (0.0, 0.5)]
    assert starts == [[0, 8, 16, 24, 32], [0, 4, 12, 20, 28, 32]]
    other = replace(data.spec, modalities=(replace(data.spec.modalities[0], bands=("B4", "B3", "B2")),))
    with pytest.raises(InferenceError, match="change the description"):
        view_on(model, other)
    with pytest.raises(InferenceError, match="the model reads s2"):
        view_on(model, replace(data.spec, modalities=(replace(data.spec.modalities[0], name="aerial"),)))
    assert isinstance(data, Data)


def test_what_a_raster_leaves_unmapped_is_said(valley, tmp_path):
    rasters = [
        Raster("s2", ("B2", "B3", "B4"), 10.0, "int16", patch=2),
        Raster("dem", ("z",), 10.0, "float32", patch=2),
    ]
    config = ModelConfig(
        describe("valley", 160.0, rasters).sensors, TINY, 16, inter_depth=1, crop_m=160.0, dataset="valley"
    )
    further = """  dem:
    files: dem.tif
    bands: [z]
    resolution_m: 10
    dtype: float32
    quantity: any
    dates: {from: reference}
    required: REQUIRED
    sensor: {patch: 2, scale: {divisor: 10.0}}
"""
    shutil.copy(valley.scene / "s2_20200601.tif", tmp_path)
    write_scene(tmp_path / "dem.tif", np.ones((1, 96, 24), np.float32), WEST, NORTH, crs=CRS)
    notes = {}
    for required in ("true", "false"):
        (tmp_path / "valley.yaml").write_text(DESCRIPTION + further.replace("REQUIRED", required))
        model = Maestro(config)
        data = open_data(model, str(tmp_path / "valley.yaml"), Options())
        spec, _ = view_on(model, data.spec)
        notes[required] = open_source(data, spec, Layout(10.0, 80.0), Options()).notes
    (note,) = notes["true"]
    assert note.startswith("dem covers 25% of what all rasters cover; the rest is not mapped")
    assert notes["false"] == ()


def test_a_missing_library_is_named(valley, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyproj", None)
    words = ["predict", str(valley.model), str(valley.description), str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--files", str(valley.scene)])
    assert str(done.exception) == "reading these files needs pyproj: pip install 'maestro-scale[geo]'"
    assert not (tmp_path / "out").exists()


def test_the_command_and_its_refusals(valley, tmp_path):
    def invoke(*args):
        words = [str(valley.model), str(valley.shards), str(tmp_path / "out"), *args]
        return CliRunner().invoke(app, ["predict", *words, "--cache-dir", str(tmp_path / "cache")])

    done = invoke("--overlap", "0", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "27 windows predicted" in done.output
    again = invoke("--overlap", "0.5")
    assert isinstance(again.exception, InferenceError)
    assert re.search("holds predictions of something else .*stride_m 160.0, now 70.0", str(again.exception))
    wrong = invoke("--target", "height")
    assert "--target: the model predicts cover" in str(wrong.exception)
    assert invoke("--embeddings", "csv").exit_code == 2
    assert "--set changes a description" in str(invoke("--set", "grid.area=x").exception)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "d.tif").write_bytes(b"mine")
    words = [str(valley.model), str(valley.shards), str(stranger)]
    assert "holds no predictions" in str(CliRunner().invoke(app, ["predict", *words]).exception)
    assert (stranger / "d.tif").read_bytes() == b"mine"


def test_an_image_is_written_in_parts_with_overviews(tmp_path):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 200, (1, 700, 1300)).astype(np.uint8)
    parts = [(r, c, whole[:, r : r + 512, c : c + 512]) for r in (0, 512) for c in (0, 512, 1024)]
    place = {"crs": CRS, "transform": rasterio.Affine(10, 0, 0, 0, -10, 0)}
    bands = Bands(("x",), "uint8", 255)
    for name, chosen in (("a.tif", parts), ("b.tif", parts), ("c.tif", parts[:3])):
        write_cog(tmp_path / name, bands, (700, 1300), iter(chosen), place, {"key": "x"})
        assert cog_validate(tmp_path / name, strict=True, quiet=True)[:3] == (True, [], [])
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with rasterio.open(tmp_path / "a.tif") as image:
        assert (image.read() == whole).all()
        assert image.overviews(1)
    with rasterio.open(tmp_path / "c.tif") as image:
        assert (image.read()[:, 512:] == 255).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.tif", "c.tif"]


def test_blocks_of_many_bands_are_small(tmp_path):
    assert [block_side(n, "float32") for n in (1, 8, 32, 128, 768)] == [512, 512, 256, 128, 64]
    values = np.random.default_rng(0).normal(size=(64, 300, 260)).astype(np.float32)
    bands = Bands(tuple(f"s2_{i}" for i in range(64)), "float32", float("nan"))
    place = {"crs": CRS, "transform": rasterio.Affine(20, 0, 0, 0, -20, 0)}
    write_cog(tmp_path / "a.tif", bands, (300, 260), [(0, 0, values)], place, {})
    assert cog_validate(tmp_path / "a.tif", strict=True, quiet=True)[:3] == (True, [], [])
    with rasterio.open(tmp_path / "a.tif") as image:
        assert image.block_shapes[0] == (128, 128)
        assert (image.read() == values).all()
    with rasterio.open(tmp_path / "a.tif", overview_level=0) as half:
        means = values.reshape(64, 150, 2, 130, 2).mean(axis=(2, 4))
        np.testing.assert_allclose(half.read(), means, atol=1e-6)


def test_errors_of_gdal_are_one_line(tmp_path, monkeypatch):
    from rasterio._err import CPLE_AppDefinedError

    def fail(*args, **options):
        raise CPLE_AppDefinedError(1, 1, "TIFFReadDirectory: failed")

    monkeypatch.setattr("rasterio.shutil.copy", fail)
    bands, place = (
        Bands(("x",), "uint8", 255),
        {"crs": CRS, "transform": rasterio.Affine(10, 0, 0, 0, -10, 0)},
    )
    with pytest.raises(DatasetError, match=r"a\.tif: cannot be written .* free space on the disk"):
        write_cog(tmp_path / "a.tif", bands, (8, 8), [(0, 0, np.zeros((1, 8, 8), np.uint8))], place, {})
    assert not list(tmp_path.iterdir())


def test_the_shipped_description_of_the_test_is_valid(tmp_path):
    (tmp_path / "valley.yaml").write_text(DESCRIPTION)
    assert load_description(tmp_path / "valley.yaml").grid is not None
    assert CLASSES[1] == "void"

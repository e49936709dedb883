"""``maestro-scale search``: neighbours by cosine, by key and by place, as GeoJSON and pictures."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.datasets import geoparquet
from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.evaluation.embedding import EmbeddingWriter
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.inference import search as module
from maestro_scale.inference.command import Options, predict
from maestro_scale.inference.errors import InferenceError
from maestro_scale.inference.run import Run
from maestro_scale.inference.search import search
from maestro_scale.interop.pretrained import load_model
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Forty vectors in two files."""
    monkeypatch.setattr(module, "_ROWS", 7)
    vectors = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    (tmp_path / "e").mkdir()
    for number in range(2):
        rows = range(20 * number, 20 * number + 20)
        table = pa.table(
            {
                "key": [f"tile-{n // 2}" for n in rows],
                "crop": [n % 2 for n in rows],
                "vector": pa.array([vectors[n].tolist() for n in rows], pa.list_(pa.float32(), 5)),
            }
        )
        shapes = [
            geoparquet.square(GeoOrigin("EPSG:2154", 650_000.0 + 200 * n, 6_860_000.0), 100.0) for n in rows
        ]
        parquet.write_table(
            geoparquet.with_geometry(table, shapes, "Polygon"), tmp_path / "e" / f"{number}.parquet"
        )
    return tmp_path / "e", vectors


def test_neighbours_are_those_of_all_vectors(folder):
    path, vectors = folder
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = search(path, "tile-11#1", 6)
    expected = np.argsort(-(unit @ unit[23]), kind="stable")[:7]
    assert [(n.key, n.crop) for n in found] == [(f"tile-{n // 2}", n % 2) for n in expected]
    np.testing.assert_allclose([n.similarity for n in found], (unit @ unit[23])[expected], rtol=1e-5)
    assert (found[0].key, found[0].crop) == ("tile-11", 1)
    assert found[0].similarity == pytest.approx(1)
    assert search(path, "tile-3")[0].crop == 0


def write(path, keys, vectors):
    table = {"key": keys, "crop": list(range(len(keys)))}
    table["vector"] = pa.array(vectors, pa.list_(pa.float32(), len(vectors[0])))
    parquet.write_table(pa.table(table), path)


def test_the_query_comes_first_and_a_key_may_look_like_a_place(tmp_path):
    write(tmp_path / "a.parquet", ["a", "a", "1,2", "z"], [[1, 0], [2, 0], [0, 1], [0, 0]])
    assert [(n.key, n.crop) for n in search(tmp_path, "a#1", 1)] == [("a", 1), ("a", 0)]
    assert search(tmp_path, "1,2")[0].key == "1,2"
    with pytest.raises(InferenceError, match="'z': its embedding is zero"):
        search(tmp_path, "z")
    write(tmp_path / "b.parquet", ["b"], [[1, 0, 0]])
    with pytest.raises(InferenceError, match="vectors of 2 and of 3 numbers"):
        search(tmp_path, "a")


def test_vectors_of_different_models_are_not_compared(tmp_path):
    write(tmp_path / "old.parquet", ["a"], [[1, 0]])
    for name, weights in (("one", b"1"), ("same", b"1"), ("other", b"2")):
        assert search(tmp_path, "a", 1)[0].key == "a"
        write(tmp_path / f"{name}.parquet", [name], [[0, 1]])
        path = tmp_path / f"{name}.parquet"
        table = parquet.read_table(path).replace_schema_metadata({"maestro_scale.weights_sha256": weights})
        parquet.write_table(table, path)
    with pytest.raises(
        InferenceError, match=r"different models \((one|other)\.parquet, (one|other)\.parquet\)"
    ):
        search(tmp_path, "a")
    assert search(tmp_path / "other.parquet", "other")[0].key == "other"


def test_a_tile_across_the_antimeridian_is_small(tmp_path):
    # 180 degrees east is 667 km west of the centre of zone 1 at the equator.
    corner = GeoOrigin("EPSG:32601", 165_500.0, 500.0)
    shape = geoparquet.square(corner, 1000.0)
    ring = module._ring(shape)
    assert np.ptp(ring[:, 0]) == pytest.approx(0.009, abs=0.001)
    assert ring[0, 0] < -180 < ring[2, 0] or ring[0, 0] < 180 < ring[2, 0]
    table = pa.table({"key": ["a"], "vector": pa.array([[1.0]], pa.list_(pa.float32(), 1))})
    parquet.write_table(geoparquet.with_geometry(table, [shape], "Polygon"), tmp_path / "a.parquet")
    assert search(tmp_path, "-179.9999,0")[0].key == search(tmp_path, "179.9999,0")[0].key == "a"


def test_a_place_is_the_tile_there(folder):
    path, _ = folder
    lon, lat = np.mean(search(path, "tile-7#1")[0].shape["coordinates"][0][:4], axis=0)
    assert (search(path, f"{lon},{lat}")[0].key, search(path, f"{lon},{lat}")[0].crop) == ("tile-7", 1)
    with pytest.raises(InferenceError, match="no embedding of such a place"):
        search(path, "10,10")
    with pytest.raises(InferenceError, match="no embedding of such a tile; give a key such as 'tile-"):
        search(path, "tile-99")
    with pytest.raises(InferenceError, match="no Parquet files"):
        search(path.parent, "tile-1")


def test_a_place_may_be_in_any_system_and_west_of_greenwich(folder):
    path, _ = folder

    def first(*words: str) -> dict:
        done = CliRunner().invoke(app, ["search", str(path), *words])
        assert done.exit_code == 0, str(done.exception)
        return json.loads(done.output)["features"][0]["properties"]

    # The upper left corner of the fifteenth square is at 650000 + 200 * 14.
    assert first("652850,6859950", "--crs", "EPSG:2154")["key"] == "tile-7"
    for query, crs in (("1", "EPSG:2154"), ("1,2", "EPSG:0"), ("a,b", "EPSG:2154")):
        done = CliRunner().invoke(app, ["search", str(path), query, "--crs", crs])
        assert isinstance(done.exception, InferenceError)
        assert "is not a place X,Y in" in str(done.exception)
    done = CliRunner().invoke(app, ["search", str(path), "-1.5,47"])
    assert isinstance(done.exception, InferenceError), "an argument, not an option"


def test_the_command_writes_geojson_and_pictures(valley, tmp_path):
    manifest = Manifest.load(str(valley.shards))
    store = Store(str(valley.shards), tmp_path / "cache", 2**30)
    model = load_model(valley.model)
    EmbeddingWriter(model, store, manifest).write(tmp_path / "out", "test")
    options = Options(embeddings="parquet", cache_dir=tmp_path / "cache")
    predict(model, str(valley.shards), tmp_path / "windows", options, Run(torch.device("cpu")))
    tables = [file for name in ("out", "windows") for file in (tmp_path / name).glob("*.parquet")]
    digests = [parquet.read_metadata(file).metadata[b"maestro_scale.weights_sha256"] for file in tables]
    assert digests == 2 * [weights_digest(model).encode()]
    words = ["--top", "3", "--out", str(tmp_path / "found.geojson"), "--png", str(tmp_path / "sheet.png")]
    done = CliRunner().invoke(
        app, ["search", str(tmp_path / "out"), "a/b", *words, "--shards", str(valley.shards)]
    )
    assert done.exit_code == 0, done.output
    features = json.loads((tmp_path / "found.geojson").read_text())["features"]
    assert len(features) == 4
    first = features[0]
    assert (first["properties"]["key"], first["properties"]["first_date"]) == ("a/b", "2020-06-01")
    assert len(first["geometry"]["coordinates"][0]) == 5
    assert (tmp_path / "sheet.png").stat().st_size > 5000
    done = CliRunner().invoke(app, ["search", str(tmp_path / "out"), "-1.5,47.2"])
    assert "no embedding of such a place" in str(done.exception)

"""The tables of ``embed`` and ``predict`` are GeoParquet: geopandas and DuckDB read geometry, dates and keys."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import geopandas
import pytest
import torch
from pyproj import Transformer
from testkit.valley import CRS, NORTH, WEST

from maestro_scale.evaluation.embedding import EmbeddingWriter
from maestro_scale.inference.command import Options, predict
from maestro_scale.inference.run import Run
from maestro_scale.inference.search import search
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store

duckdb = pytest.importorskip("duckdb", reason="needs the test extra")
DAY = datetime.date(2020, 6, 1)


@pytest.fixture(scope="module")
def tables(model, valley, tmp_path_factory) -> dict[str, Path]:
    """Of vectors of crops (polygons), and of windows (points), of the three tiles of the valley."""
    folder = tmp_path_factory.mktemp("tables")
    shards = str(valley.shards)
    EmbeddingWriter(model, Store(shards, folder / "cache", 2**30), Manifest.load(shards)).write(
        folder / "crops", "test"
    )
    options = Options(embeddings="parquet", cache_dir=folder / "cache")
    predict(model, shards, folder / "windows", options, Run(torch.device("cpu")))
    return {"crops": folder / "crops", "windows": folder / "windows"}


@pytest.mark.parametrize(("name", "kind"), [("crops", "Polygon"), ("windows", "Point")])
def test_geopandas_and_duckdb_read_the_same(tables, name, kind):
    files = sorted(tables[name].glob("*.parquet"))
    (frame,) = (geopandas.read_parquet(file) for file in files)
    assert frame.crs.to_authority() == ("OGC", "CRS84")
    assert set(frame.geom_type) == {kind}
    query = "SELECT key, first_date, last_date, ST_AsText(geometry), typeof(geometry), vector FROM read_parquet(?)"
    rows = duckdb.execute(query, [str(tables[name] / "*.parquet")]).fetchall()
    assert len(rows) == len(frame) == 27
    assert {row[0] for row in rows} == {"a/b", "../c", "d"}
    assert [row[0] for row in rows] == frame.key.tolist()
    assert {row[1:3] for row in rows} == {(DAY, DAY)}
    assert {row[4] for row in rows} == {"GEOMETRY('OGC:CRS84')"}
    assert all(row[3].startswith(kind.upper()) for row in rows)
    assert [len(row[5]) for row in rows] == [32] * 27
    # The middle of the first crop of "d", whose tile begins 2000 m east of the others' corner, 80 m from its edges.
    lon, lat = Transformer.from_crs(CRS, "OGC:CRS84", always_xy=True).transform(WEST + 2080, NORTH - 80)
    middle = frame[frame.key == "d"].geometry.iloc[0].centroid
    assert (middle.x, middle.y) == pytest.approx((lon, lat), abs=1e-6)


def test_duckdb_finds_the_neighbours_of_search(tables):
    """The statement of docs/predict.md."""
    page = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    (statement,) = re.findall(r"SELECT key, list_cosine_similarity.*?;", page, re.DOTALL)
    statement = statement.replace("EMBEDDINGS", str(tables["crops"])).replace("KEY", "a/b")
    found = duckdb.execute(statement).fetchall()
    expected = search(tables["crops"], "a/b", 11)
    assert [key for key, _ in found] == [n.key for n in expected]
    assert [cosine for _, cosine in found] == pytest.approx([n.similarity for n in expected], abs=1e-5)

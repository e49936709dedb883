"""Tiles that lack an optional sensor, in ``predict --embeddings parquet``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import torch
from testkit.models import TINY

from maestro_scale.evaluation.embedding import EmbeddingWriter
from maestro_scale.inference.command import Options, predict
from maestro_scale.inference.run import Run
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.from_arrays import Raster, describe, make_tile
from maestro_scale.shards.write.writer import Writer

CPU = Run(torch.device("cpu"))


def test_tiles_that_lack_a_sensor_have_the_vectors_of_embed(tmp_path):
    # Sensors of one group follow each other in a vector: a, c, b.
    raster = Raster("", ("x",), 10.0, "int16", patch=2, divisor=100.0, optional=True)
    rasters = [replace(raster, name=name, group=group) for name, group in (("a", "g"), ("b", ""), ("c", "g"))]
    spec = describe("valley", 80.0, rasters)
    config = ModelConfig(
        spec.sensors, TINY, spec.pos_grid, inter_depth=1, fusion="group", crop_m=80.0, dataset="valley"
    )
    model = Maestro(config).initialise(0).eval()
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 100, (1, 1, 8, 8)).astype(np.int16) for name in "abc"}
    shards = str(tmp_path / "shards")
    with Writer(shards, spec, "test") as writer:
        for key in ("abc", "ab", "c"):
            arrays = {name: pixels[name] for name in key}
            writer.add(make_tile(spec, key, arrays, {name: ["2020-06-01"] for name in arrays}))
    EmbeddingWriter(model, Store(shards, tmp_path / "cache", 2**30), Manifest.load(shards)).write(
        tmp_path / "embed", "test"
    )
    predict(model, shards, tmp_path / "out", Options(embeddings="parquet", cache_dir=tmp_path / "cache"), CPU)
    found, expected = (
        {
            row["key"]: row["vector"]
            for file in folder.glob("*.parquet")
            for row in parquet.read_table(file).to_pylist()
        }
        for folder in (tmp_path / "out", tmp_path / "embed")
    )
    assert sorted(found) == ["ab", "abc", "c"]
    for key, vector in found.items():
        np.testing.assert_allclose(vector, expected[key], atol=1e-6)
    a, c, b = np.split(np.array(found["ab"]), 3)
    np.testing.assert_allclose(c, (a + b) / 2, atol=1e-6)
    c1, c2, c3 = np.split(np.array(found["c"]), 3)
    assert c1.tolist() == c2.tolist() == c3.tolist()

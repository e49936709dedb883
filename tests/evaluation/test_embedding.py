"""``maestro-scale embed``: every crop once, in the order of the shards, on any number of ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as parquet
import pytest
import rasterio
import torch
from rio_cogeo.cogeo import cog_validate

from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.escaping import printable
from maestro_scale.evaluation import embedding
from maestro_scale.evaluation.embedding import EmbeddingWriter
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.interop.pretrained import load_model
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from tests.evaluation.conftest import FIELDS, field_tile
from tests.testkit.hostile import NAMES


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Seven tiles in three shards."""
    folder = tmp_path_factory.mktemp("embed") / "shards"
    with Writer(str(folder), FIELDS, "test") as writer:
        writer._shard_bytes = 10_000
        for number in range(7):
            writer.add(field_tile(number))
    assert len(Manifest.load(str(folder)).shards) == 3
    return folder


def embedder(fields, shards, cache, **options) -> EmbeddingWriter:
    store = Store(str(shards), cache, 2**30)
    return EmbeddingWriter(
        load_model(fields.model), store, Manifest.load(str(shards)), batch_size=5, **options
    )


def tables(folder: Path) -> dict[str, dict]:
    return {p.name: parquet.read_table(p).to_pydict() for p in sorted(folder.glob("*.parquet"))}


def test_vectors_are_the_models_in_the_order_of_the_shards(fields, shards, tmp_path):
    maker = embedder(fields, shards, tmp_path)
    assert maker.write(tmp_path / "out", "test") == 28
    found = tables(tmp_path / "out")
    assert list(found) == [Path(s.path).stem + ".parquet" for s in maker.manifest.shards]
    vectors = np.concatenate([t["vector"] for t in found.values()])
    source = Source(FIELDS, maker.manifest.shards, maker.store)
    with torch.no_grad():
        expected = torch.cat([maker.model.embed(b).vector for b in EvalLoader(source, 28)])
    np.testing.assert_allclose(vectors, expected.numpy(), rtol=1e-4, atol=1e-5)
    keys = [key for t in found.values() for key in t["key"]]
    assert sorted(set(keys)) == [f"field-{n:03d}" for n in range(7)]
    first = next(iter(found.values()))
    assert first["crop"][:4] == [0, 1, 2, 3]
    assert list(zip(first["north_m"], first["west_m"], strict=True))[:4] == [
        (0, 0),
        (0, 20),
        (20, 0),
        (20, 20),
    ]


def test_files_are_geoparquet_and_cogs(fields, tmp_path):
    with Writer(str(tmp_path / "shards"), FIELDS, "test") as writer:
        for number in range(2):
            origin = GeoOrigin("EPSG:2154", 650_000.0 + 1000 * number, 6_860_000.0) if number else None
            writer.add(dataclasses.replace(field_tile(number), origin=origin))
    maker = embedder(fields, tmp_path / "shards", tmp_path)
    maker.write(tmp_path / "out", "test")
    frame = geopandas.read_parquet(next((tmp_path / "out").glob("*.parquet")))
    placed = frame[frame.key == "field-001"]
    assert frame[frame.key == "field-000"].geometry.isna().all()
    assert len(placed) == 4
    there = placed.to_crs("EPSG:2154")
    np.testing.assert_allclose(there.geometry.area, 1600, rtol=1e-6)
    np.testing.assert_allclose(there.geometry.bounds.minx, there.x_m, atol=1e-3)
    np.testing.assert_allclose(there.geometry.bounds.maxy, there.y_m, atol=1e-3)
    assert {str(d) for d in frame.first_date} == {"2020-01-20"}
    assert {str(d) for d in frame.last_date} == {"2020-10-16"}
    images = dataclasses.replace(maker, what="tokens", format="tiff")
    images.write(tmp_path / "images", "test")
    for path in (tmp_path / "images").rglob("*.tif"):
        assert cog_validate(path, strict=True, quiet=True)[0]
        with rasterio.open(path) as image:
            assert image.descriptions[0] == f"{path.stem.rpartition('.')[2]}_0"
            assert image.tags()["first_date"] == "2020-01-20"


def test_ranks_share_the_shards_and_a_missing_file_is_written_again(fields, shards, tmp_path):
    maker = embedder(fields, shards, tmp_path)
    maker.write(tmp_path / "alone", "test")
    counts = [maker.write(tmp_path / "shared", "test", rank, 2) for rank in range(2)]
    assert sum(counts) == 28
    assert min(counts) > 0
    # Batches are cut elsewhere, which moves the last bit.
    alone, shared = tables(tmp_path / "alone"), tables(tmp_path / "shared")
    assert {n: t["key"] for n, t in alone.items()} == {n: t["key"] for n, t in shared.items()}
    for name in alone:
        np.testing.assert_allclose(alone[name]["vector"], shared[name]["vector"], rtol=1e-4, atol=1e-5)
    gone = sorted((tmp_path / "alone").glob("*.parquet"))[1]
    gone.unlink()
    assert 0 < maker.write(tmp_path / "alone", "test") < 28
    assert tables(tmp_path / "alone")[gone.name]["key"] == alone[gone.name]["key"]
    assert maker.write(tmp_path / "alone", "test") == 0


@pytest.mark.slow
def test_token_grids_as_columns_and_as_images(fields, shards, tmp_path):
    embedder(fields, shards, tmp_path, what="tokens").write(tmp_path / "table", "test")
    table = parquet.read_table(sorted((tmp_path / "table").glob("*.parquet"))[0])
    assert table.schema.field("s2").metadata == {b"shape": b"2x16x32"}
    tokens = np.array(table["s2"].to_pylist()).reshape(-1, 2, 16, 32)
    embedder(fields, shards, tmp_path, what="tokens", format="tiff").write(tmp_path / "images", "test")
    key, crop = table["key"][1].as_py(), table["crop"][1].as_py()
    (path,) = (tmp_path / "images").rglob(f"{key}.{crop}.s2.tif")
    with rasterio.open(path) as image:
        np.testing.assert_allclose(image.read(), tokens[1].mean(0).T.reshape(32, 4, 4), rtol=1e-4, atol=1e-5)
        assert (image.transform.a, image.transform.c, image.transform.f) == (10.0, 20.0, 0.0)


def test_incomplete_files_are_written_again_and_those_of_another_embedding_refused(fields, shards, tmp_path):
    out = tmp_path / "out"
    maker = embedder(fields, shards, tmp_path)
    maker.write(out, "test")
    first, second, _ = sorted(out.glob("*.parquet"))
    before = tables(out)
    first.write_bytes(first.read_bytes()[:100])
    other = parquet.read_table(second)
    parquet.write_table(other.replace_schema_metadata({"maestro_scale.shard_sha256": "another"}), second)
    assert maker.write(out, "test") == sum(len(before[p.name]["key"]) for p in (first, second))
    assert tables(out) == before
    stranger = load_model(fields.model)
    with torch.no_grad():
        next(stranger.parameters()).add_(0.1)
    for changed in (
        dataclasses.replace(maker, model=stranger),
        dataclasses.replace(maker, what="tokens"),
        dataclasses.replace(maker, what="tokens", format="tiff"),
    ):
        with pytest.raises(EvaluationError, match="holds embeddings of something else"):
            changed.write(out, "test")
    assert tables(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "tiff"])
def test_files_of_another_model_are_written_again(fields, shards, tmp_path, format):
    maker = embedder(fields, shards, tmp_path, what="tokens", format=format)
    stranger = load_model(fields.model)
    with torch.no_grad():
        next(stranger.parameters()).add_(0.1)
    other = dataclasses.replace(maker, model=stranger)
    maker.write(tmp_path / "out", "test")
    other.write(tmp_path / "other", "test")
    mine, theirs = (sorted((tmp_path / folder).glob("test-*"))[0] for folder in ("out", "other"))
    mine.rename(tmp_path / "mine")
    theirs.rename(mine)
    assert maker.write(tmp_path / "out", "test") == 8  # the crops of its two tiles
    # Without a record, a file says what it contains, or is not used.
    (tmp_path / "out" / "_embedding.json").write_text("{")
    assert maker.write(tmp_path / "out", "test") == 0
    (tmp_path / "other" / "_embedding.json").unlink()
    assert maker.write(tmp_path / "other", "test") == 28


def test_what_killed_jobs_leave_is_removed(fields, shards, tmp_path, monkeypatch):
    maker, out = embedder(fields, shards, tmp_path), tmp_path / "out"
    old, new = out / ".partial-old", out / ".partial-new"  # of an earlier revision
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))

    class Killed(BaseException):
        pass

    def kill(*_):
        (out / ".parts" / "test" / ".partial-1").write_bytes(b"half")
        raise Killed

    with pytest.raises(Killed):
        maker.write(out, "test", progress=kill)
    assert [old.exists(), new.exists()] == [False, True]
    assert len(list(out.glob("*.parquet"))) == 1
    new.rmdir()
    assert maker.write(out, "test") > 0
    assert sorted(p.suffix for p in out.iterdir()) == [".json"] + 3 * [".parquet"]


def test_two_jobs_with_different_models_cannot_share_a_folder(fields, shards, tmp_path, monkeypatch):
    first = embedder(fields, shards, tmp_path)
    second = dataclasses.replace(first, what="tokens")
    create = embedding._create

    def create_late(path, unfinished, text):
        monkeypatch.setattr(embedding, "_create", create)
        first.write(tmp_path / "out", "test")
        return create(path, unfinished, text)

    monkeypatch.setattr(embedding, "_create", create_late)
    with pytest.raises(EvaluationError, match="holds embeddings of something else"):
        second.write(tmp_path / "out", "test")
    assert first.write(tmp_path / "out", "test") == 0


def test_embeddings_of_another_precision_are_refused_and_those_without_one_are_fp32(
    fields, shards, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    maker = embedder(fields, shards, tmp_path)
    maker.write(out, "test")
    path = out / "_embedding.json"
    metadata = json.loads(path.read_text())
    assert metadata.pop("precision") == "fp32"
    path.write_text(json.dumps(metadata))  # as written before the precision was recorded
    assert maker.write(out, "test") == 0
    monkeypatch.setattr("maestro_scale.evaluation.embedding.eval_precision", lambda *args: "bf16")
    with pytest.raises(EvaluationError, match="precision fp32, now bf16"):
        maker.write(out, "test")


@pytest.mark.slow
def test_where_a_crop_lies_on_the_ground(fields, tmp_path):
    with Writer(str(tmp_path / "shards"), FIELDS, "test") as writer:
        writer.add(dataclasses.replace(field_tile(0), origin=GeoOrigin("EPSG:2154", 650_000.0, 6_700_000.0)))
        writer.add(field_tile(1))
    maker = embedder(fields, tmp_path / "shards", tmp_path, what="tokens")
    maker.write(tmp_path / "table", "test")
    (table,) = tables(tmp_path / "table").values()
    rows = {(k, c): i for i, (k, c) in enumerate(zip(table["key"], table["crop"], strict=True))}
    placed, lost = rows["field-000", 3], rows["field-001", 3]
    assert [table[n][placed] for n in ("crs", "x_m", "y_m")] == ["EPSG:2154", 650_020.0, 6_699_980.0]
    assert [table[n][lost] for n in ("crs", "x_m", "y_m", "west_m")] == [None, None, None, 20.0]
    images = dataclasses.replace(maker, format="tiff")
    assert images.write(tmp_path / "images", "test") == 8
    assert images.write(tmp_path / "images", "test") == 0
    (mark,) = (tmp_path / "images").rglob("maestro_scale.shard_sha256")
    mark.write_text("another")
    assert images.write(tmp_path / "images", "test") == 8
    (path,) = (tmp_path / "images").rglob("field-000.3.s2.tif")
    with rasterio.open(path) as image:
        assert (image.crs.to_string(), image.bounds) == (
            "EPSG:2154",
            (650_020, 6_699_940, 650_060, 6_699_980),
        )


def test_an_unwritable_output_is_reported(fields, shards, tmp_path):
    with pytest.raises(EvaluationError, match="needs --what tokens"):
        embedder(fields, shards, tmp_path, format="tiff")
    with pytest.raises(ManifestError, match="no split 'val'"):
        embedder(fields, shards, tmp_path).write(tmp_path / "out", "val")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(fields, shards, tmp_path):
    program = str(Path(sys.executable).parent / "maestro-scale")
    command = [
        program,
        "embed",
        str(fields.model),
        str(shards),
        str(tmp_path / "out"),
        f"--cache-dir={tmp_path}",
    ]
    message = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        message.append(done.stdout + done.stderr)
    assert "crops embedded, rank 0's share of 2" in message[0]
    assert ", rank 0's share of 2: " in message[0], "its progress"
    assert "crops" not in message[1]
    assert len(tables(tmp_path / "out")) == 3
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    look = message[0].partition("; next: ")[2].splitlines()[0]
    seen = subprocess.run(look, shell=True, env=env, capture_output=True, text=True, timeout=120)
    assert "north_m: double" in seen.stdout, seen.stderr
    wrong = subprocess.run([*command, "--what=pixels"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "vector, tokens" in wrong.stderr


@pytest.mark.slow
def test_keys_choose_no_path(fields, tmp_path):
    """Names of others: every image is in the folder, and says which tile it shows."""
    keys = [*NAMES[:12], str(tmp_path / "outside" / "tile"), "é" * 130]
    with Writer(str(tmp_path / "shards"), FIELDS, "test") as writer:
        for number, key in enumerate(keys):
            writer.add(dataclasses.replace(field_tile(number), key=key))
    maker = embedder(fields, tmp_path / "shards", tmp_path / "cache", what="tokens", format="tiff")
    assert maker.write(tmp_path / "out", "test") == 4 * len(keys)
    images = sorted(tmp_path.rglob("*.tif"))
    (folder,) = {path.parent for path in images}
    assert folder.parent == tmp_path / "out"
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert {line["file"] for line in index} == {path.name for path in images}
    assert {(line["key"], line["crop"], line["sensor"]) for line in index} == {
        (key, crop, sensor) for key in keys for crop in range(4) for sensor in ("aerial", "s2")
    }
    for line in index[::7]:
        with rasterio.open(folder / line["file"]) as image:
            assert image.tags()["key"] == printable(line["key"])


@pytest.mark.parametrize("format", ["tiff", "parquet"])
def test_files_of_others_are_kept(fields, shards, tmp_path, format):
    """A manifest chooses the names within the output folder."""
    maker = embedder(fields, shards, tmp_path / "cache", what="tokens", format=format)
    other = tmp_path / "out" / "test-000001" if format == "tiff" else tmp_path / "out" / "test-000001.parquet"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("x")
    with pytest.raises(EvaluationError, match=r"test-000001.* exists, but .* holds no embeddings"):
        maker.write(tmp_path / "out", "test")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [other.name, "notes.txt"]


def test_shards_of_one_name_in_two_folders_are_two_files(fields, shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    manifest = json.loads((root / "manifest.json").read_text())
    for number, shard in enumerate(manifest["shards"]):
        (root / str(number)).mkdir()
        for file in (shard["path"], shard["path"].replace(".tar", ".index.json")):
            (root / file).rename(root / str(number) / file.replace(f"{number:06d}", "same"))
        shard["path"] = f"{number}/{shard['path'].replace(f'{number:06d}', 'same')}"
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "manifest.sha256").unlink()
    assert embedder(fields, root, tmp_path / "cache").write(tmp_path / "out", "test") == 28
    assert list(tables(tmp_path / "out")) == [f"{n}%2Ftest-same.parquet" for n in range(3)]

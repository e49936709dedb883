"""Shards read by a stock WebDataset pipeline, and the example in docs/webdataset.md."""

from __future__ import annotations

import pickle
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from shards.kit import TILE_BYTES, Toy, tile, toy_keys
from testkit.web_server import serve

from maestro_scale.shards import Manifest, Raster, Target, Writer, as_webdataset, describe, write_shards
from maestro_scale.shards.errors import BadShard, ManifestError
from maestro_scale.shards.format.fields import tile_fields

PAGE = Path(__file__).parents[2] / "docs" / "webdataset.md"
SMALL = 4 * TILE_BYTES / 1e6


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("as?web#dataset")
    write_shards(Toy(12), str(folder), "train", shard_mb=SMALL, codec="zstd")
    write_shards(Toy(2), str(folder), "val", shard_mb=SMALL, codec="zstd")
    return folder


def check(samples, keys) -> None:
    assert sorted(s["__key__"] for s in samples) == sorted(keys)
    for sample in samples:
        wanted = tile_fields(tile(sample["__key__"]))
        assert sample.keys() - {"__key__", "__url__"} == wanted.keys()
        for name, array in wanted.items():
            assert sample[name].dtype == array.dtype
            np.testing.assert_array_equal(sample[name], array)


def test_samples_equal_the_tiles(shards):
    dataset = as_webdataset(str(shards), "train")
    assert isinstance(dataset, wds.WebDataset)
    samples = list(dataset)
    check(samples, toy_keys(12))
    samples[0]["s2"][:] = 0  # a copy that can be written to
    assert len(list(as_webdataset(str(shards), "val"))) == 2
    check(list(pickle.loads(pickle.dumps(dataset))), toy_keys(12))


def test_methods_of_webdataset_can_be_appended(shards):
    dataset = as_webdataset(str(shards), "train", fields=["aerial", "target.kinds"], shardshuffle=10, seed=3)
    batches = list(dataset.shuffle(100).to_tuple("__key__", "aerial", "target.kinds").batched(5))
    assert [images.shape for _, images, _ in batches] == [(n, 1, 3, 40, 40) for n in (5, 5, 2)]
    assert sorted(key for keys, _, _ in batches for key in keys) == toy_keys(12)
    first = next(iter(dataset))
    assert first.keys() == {"__key__", "__url__", "aerial", "target.kinds"}


def test_ranks_and_workers_read_other_shards(shards, monkeypatch):
    def keys(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        return [s["__key__"] for s in as_webdataset(str(shards), "train", fields=["ref_date"])]

    assert sorted(keys(0) + keys(1) + keys(2)) == toy_keys(12)
    monkeypatch.setenv("WORLD_SIZE", "1")
    endless = as_webdataset(str(shards), "train", fields=["ref_date"], resampled=True, seed=0)
    assert len(list(islice(endless, 30))) == 30


def test_a_tile_has_the_fields_of_its_sensors(tmp_path):
    rasters = [
        Raster("s2", ("red",), 10, "int16", 2, optional=True),
        Raster("dem", ("height",), 10, "int16", 2),
    ]
    with Writer(str(tmp_path), describe("some", 60, rasters), "train") as writer:
        for i in range(6):
            arrays = {"dem": np.full((1, 6, 6), i, np.int16)} | (
                {"s2": np.ones((1, 6, 6), np.int16)} if i % 2 else {}
            )
            writer.add_arrays(f"k{i}", arrays, dict.fromkeys(arrays, "2021-05-01"))
    samples = list(as_webdataset(str(tmp_path), "train"))
    assert {s["__key__"]: "s2.dates" in s for s in samples} == {f"k{i}": i % 2 == 1 for i in range(6)}
    chosen = as_webdataset(str(tmp_path), "train").select(lambda tile: "s2" in tile)
    assert sorted(s["__key__"] for s in chosen) == ["k1", "k3", "k5"]


def test_a_wrong_split_or_field_is_refused(shards):
    with pytest.raises(ManifestError, match="has no split 'tset'"):
        as_webdataset(str(shards), "tset")
    with pytest.raises(ManifestError, match=r"has no field 's2.date' \(did you mean 's2.dates'"):
        as_webdataset(str(shards), "train", fields=["s2.date"])


def damaged(folder: Path, change) -> str:
    write_shards(Toy(12), str(folder), "train", shard_mb=SMALL)
    path = folder / Manifest.load(str(folder)).shards[1].path
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))
    return str(folder)


def flip(content: bytearray) -> bytes:
    content[512 + 4000] ^= 1  # in the first sample's data
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "train-000001.tar: bad shard: has another SHA-256"),
        (lambda content: content[:-2048], "train-000001.tar: bad shard: has .* bytes, the manifest says"),
        (lambda content: b"\x1f\x8b" + content[2:], "train-000001.tar: bad shard: is compressed"),
    ],
)
def test_a_damaged_shard_is_an_error_or_skipped(tmp_path, change, message):
    url = damaged(tmp_path, change)
    with pytest.raises(BadShard, match=message):
        list(as_webdataset(url, "train"))
    errors = []
    rest = list(as_webdataset(url, "train", handler=lambda error: errors.append(error) or True))
    assert len(errors) == 1
    assert len(rest) >= 8


def test_shards_are_read_over_http(tmp_path):
    write_shards(Toy(5), str(tmp_path), "train", shard_mb=SMALL)
    with serve(tmp_path) as served:
        check(list(as_webdataset(served.url, "train")), toy_keys(5))


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    """In this process, so that torch is not imported again."""
    rasters = [Raster("s2", ("red", "infrared"), 10, "int16", 2, divisor=5000, num_dates=4)]
    spec = describe("orchards", 60, rasters, [Target("kind", "multilabel", ("apple", "pear", "plum"))])
    monkeypatch.chdir(tmp_path)
    with Writer("shards/orchards", spec, "train") as writer:
        for i in range(20):
            image = np.full((3, 2, 6, 6), i, np.int16)
            days = ["2021-04-01", "2021-05-01", "2021-06-01"]
            writer.add_arrays(f"o.{i}", {"s2": image}, {"s2": days}, targets={"kind": {"pear": 1.0}})
    code = re.search(r"<!-- test: loop.py -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    code = code.replace("num_workers=1", "num_workers=0")
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "16 (16, 2, 6, 6) torch.int16 (16, 3)",
        "4 (4, 2, 6, 6) torch.int16 (4, 3)",
    ]

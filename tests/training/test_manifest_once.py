"""A manifest is read and parsed by one rank of each node, and no loader process gets a copy of its shards."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from maestro_scale.evaluation import in_loop
from maestro_scale.recipe import load_recipe
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format import manifest as manifest_module
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.format.shard_table import ShardInfo, ShardTable
from maestro_scale.shards.read import manifest_cache
from maestro_scale.stream.batch_builder import BatchBuilder, BuilderSettings
from maestro_scale.stream.source import Source
from maestro_scale.stream.workers import _WorkerDataset
from maestro_scale.training.manifests import UsedDataset, load_manifests
from maestro_scale.training.pretrain import identity, open_datasets

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARDS = str(FIXTURES / "shards")


@dataclass
class ThreadWorld:
    """A rank that is a thread of this process."""

    rank: int
    size: int
    local_rank: int
    meet: Barrier
    board: dict

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value):
        self.board[self.rank] = value
        self.meet.wait(60)
        found = [self.board[rank] for rank in range(self.size)]
        self.meet.wait(60)
        return found

    def from_main(self, value):
        return self.gather(value)[0]


def on_ranks(nodes: int, per_node: int, action):
    """What ``action(world)`` returns or raises on each rank."""
    size = nodes * per_node
    meet, board = Barrier(size), {}
    worlds = [ThreadWorld(rank, size, rank % per_node, meet, board) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(action, world) for world in worlds]
        return [future.exception() or future.result() for future in futures]


@pytest.fixture
def counts(monkeypatch):
    """How often a manifest was read from the store, and parsed."""
    found = {"read": 0, "parsed": 0}

    def counting(name, real):
        def call(*args):
            found[name] += 1
            return real(*args)

        return call

    for module in (manifest_module, manifest_cache):
        monkeypatch.setattr(module, "read_manifest", counting("read", module.read_manifest))
    monkeypatch.setattr(
        manifest_module, "parse_versioned", counting("parsed", manifest_module.parse_versioned)
    )
    return found


def recipe(tmp_path, *settings):
    return load_recipe(
        FIXTURES / "pretrain.yaml",
        [f"data.mixture[0].shards={SHARDS}", f"data.cache_dir={tmp_path / 'cache'}", *settings],
    )


def test_one_rank_of_each_node_reads_the_manifests_of_a_training(tmp_path, counts):
    expected = Manifest.load(SHARDS)
    counts.update(read=0, parsed=0)
    opened = on_ranks(2, 4, lambda world: open_datasets(recipe(tmp_path), world))
    assert [d.manifest.digest for (d,) in opened] == [expected.digest] * 8
    assert all(d.source.shards == expected.shards_of(d.source.table.splits[:1]) for (d,) in opened)
    # Two nodes that share one cache here: both read the file, and may parse it at the same time.
    assert counts["read"] == 2
    assert 1 <= counts["parsed"] <= 2
    opened = on_ranks(1, 4, lambda world: open_datasets(recipe(tmp_path), world))
    assert len(opened) == 4
    assert counts["read"] == 3


def test_one_rank_of_each_node_reads_the_manifest_of_the_benchmark_of_a_training(tmp_path, counts):
    shards = tmp_path / "benchmark"
    shutil.copytree(SHARDS, shards)
    loaded = recipe(tmp_path, f"evaluation.shards={shards}")
    (dataset,) = open_datasets(loaded)
    used = UsedDataset("mixture", SHARDS, dataset.manifest, ("train",))
    counts.update(read=0)
    found = on_ranks(2, 4, lambda world: in_loop._benchmark(loaded, [used], world))
    assert {benchmark.manifest.digest for benchmark, _ in found} == {dataset.manifest.digest}
    assert counts["read"] == 2


def test_one_rank_alone_and_no_process_group_read_it_too(tmp_path, counts):
    for world in (None, ThreadWorld(0, 1, 0, Barrier(1), {})):
        (manifest,) = load_manifests([SHARDS], tmp_path, world)
        assert manifest.digest == Manifest.load(SHARDS).digest


def test_an_error_of_one_rank_is_that_of_all(tmp_path):
    found = on_ranks(2, 2, lambda world: load_manifests([SHARDS, str(tmp_path / "none")], tmp_path, world))
    assert [type(error) for error in found] == [ManifestError] * 4
    assert len({str(error) for error in found}) == 1
    assert "none/manifest.json: not found" in str(found[0])


def test_a_rank_with_a_cache_of_its_own_reads_the_manifest_itself(tmp_path, counts):
    found = on_ranks(1, 3, lambda world: load_manifests([SHARDS], tmp_path / str(world.rank), world))
    assert len({m.digest for (m,) in found}) == 1
    assert counts["read"] == 3


def test_the_digest_of_the_splits_is_computed_by_rank_0(tmp_path, monkeypatch):
    calls = []
    real = Manifest.digest_of
    monkeypatch.setattr(Manifest, "digest_of", lambda *args: calls.append(args[1]) or real(*args))
    loaded = recipe(tmp_path)

    def digests(world):
        opened = open_datasets(loaded, world)
        world.device = torch.device("cpu")
        return identity(loaded, _NoModel(), opened, world)["data"]["manifests"]

    found = on_ranks(1, 4, digests)
    assert found == [[real(Manifest.load(SHARDS), loaded.data.mixture[0].split)]] * 4
    assert len(calls) == 1


class _NoModel:
    def to_dict(self) -> dict:
        return {}


def many(count: int) -> list[ShardInfo]:
    return [ShardInfo(f"train-{i:06d}.tar", "train", 10_000 + i, 300, f"{i:064x}") for i in range(count)]


def pickled_bytes(tmp_path, shards, indices=None) -> int:
    """Bytes that a loader process gets when it is started."""
    (dataset,) = open_datasets(recipe(tmp_path))
    source = Source(dataset.source.spec, shards, dataset.source.store, indices=indices)
    dataset = _WorkerDataset(BatchBuilder(BuilderSettings((source,))), torch.empty(1, dtype=torch.uint8))
    return len(bytes(ForkingPickler.dumps(dataset)))


@pytest.mark.parametrize("kind", ["table", "numbers of samples", "ranges of samples", "samples by position"])
def test_a_loader_process_gets_no_copy_of_the_shards(tmp_path, kind):
    found = []
    for count in (10, 3000):
        shards, indices = many(count), None
        if kind == "numbers of samples":
            indices = [(1, 5, 7)] * count
        elif kind == "ranges of samples":
            indices = [range(2, 300)] * count
        if kind == "samples by position":
            (dataset,) = open_datasets(recipe(tmp_path))
            whole = Source(dataset.source.spec, shards, dataset.source.store)
            chosen = whole.select_samples(np.arange(0, 300 * count, 7))
            shards, indices = chosen.shards, chosen.indices
        found.append(pickled_bytes(tmp_path, shards, indices))
    assert found[1] - found[0] < 100  # a few digits; 3,000 shards would be 300 kB
    assert found[1] < 40_000


def test_a_loader_process_gets_the_name_of_a_mapped_manifest(tmp_path):
    """3,000 shards, of which some are in use, in the file of a node."""
    (plain,) = open_datasets(recipe(tmp_path))
    folder = tmp_path / "many"
    folder.mkdir()
    text = json.loads(plain.manifest.dumps())
    text["shards"] = [
        {"path": s.path, "split": s.split, "bytes": s.bytes, "samples": s.samples, "sha256": s.sha256}
        for s in many(3000)
    ]
    (folder / "manifest.json").write_text(json.dumps(text))
    (manifest,) = load_manifests([str(folder)], tmp_path / "cache", None)
    shards = manifest.shards_of(["train"])
    assert isinstance(shards, ShardTable)
    assert list(shards) == many(3000)
    assert pickled_bytes(tmp_path, shards) < 40_000
    assert pickled_bytes(tmp_path, shards[5:2000]) < 40_000

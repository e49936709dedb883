"""Tiles that lack sensors: stored by set, divided for training, scheduled exactly, and each scored once."""

from __future__ import annotations

import collections
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stream.conftest import SPEC

from maestro_scale.datasets.spec import DatasetSpec, Tile
from maestro_scale.shards.errors import BadShard
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.loader import Step, TrainLoader
from maestro_scale.stream.mixture import NestedMixture
from maestro_scale.stream.plan import SampleOrderError
from maestro_scale.stream.sensor_sets import complete, divide, proportional, runs
from maestro_scale.stream.source import Source

OPTIONAL = replace(SPEC, modalities=tuple(replace(m, optional=m.name != "aerial") for m in SPEC.modalities))


def lacking(tile: Tile, *absent: str) -> Tile:
    """The tile without these modalities."""
    parts = ({n: a for n, a in d.items() if n not in absent} for d in (tile.arrays, tile.dates, tile.masks))
    arrays, dates, masks = parts
    return replace(tile, arrays=arrays, dates=dates, masks=masks)


def absent_of(number: int) -> tuple[str, ...]:
    """Of 60 tiles: 45 are complete, 10 lack s1, 5 lack both s2 and s1."""
    return () if number < 45 else ("s1",) if number < 55 else ("s2", "s1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tile_of: Callable[[int], Tile]) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    with Writer(str(root / "shards"), OPTIONAL, "train") as writer:
        writer._shard_bytes = 80_000
        for number in range(60):
            writer.add(lacking(tile_of(number), *absent_of(number)))
    return root


@pytest.fixture
def mixed(folder: Path) -> Source:
    return opened(folder, SPEC)


def opened(folder: Path, spec: DatasetSpec) -> Source:
    shards = Manifest.load(str(folder / "shards")).shards_of(["train"])
    return Source(spec, shards, Store(str(folder / "shards"), folder / "cache", 2**30))


def loader(source: Source, **settings) -> TrainLoader:
    return TrainLoader([source], **{"seed": 3, "lanes": 2, "global_batch": 4, "micro_batch": 2} | settings)


def tiles_of(step: Step) -> list[str]:
    return [tile for batch in step.batches for tile in batch.tiles]


def test_an_epoch_has_every_tile_once_in_steps_of_one_set_of_sensors(mixed: Source):
    stream = loader(mixed)
    # 45 = 11 · 4 + 1, 10 = 2 · 4 + 2, 5 = 1 · 4 + 1: the remainders are left out.
    assert list(stream.sources) == ["toy", "toy~s1", "toy~s2+s1"]
    assert stream.steps_per_epoch == 14
    pixels = {"toy": {"aerial", "s2", "s1"}, "toy~s1": {"aerial", "s2"}, "toy~s2+s1": {"aerial"}}
    steps = list(stream.steps(0, 28))
    for epoch in (steps[:14], steps[14:]):
        assert collections.Counter(s.dataset for s in epoch) == {"toy": 11, "toy~s1": 2, "toy~s2+s1": 1}
        used = [tile for s in epoch for tile in tiles_of(s)]
        assert len(used) == len(set(used)) == 56
        for step in epoch:
            for batch in step.batches:
                assert set(batch.pixels) == set(batch.dates) == set(batch.noise) == pixels[step.dataset]
                for tile in batch.tiles:
                    lacks = absent_of(int(tile.removeprefix("tile-")))
                    assert step.dataset == "toy" + ("~" + "+".join(lacks) if lacks else "")
    # Another order, and other tiles left out, in every epoch.
    assert tiles_of(steps[0]) != tiles_of(steps[14])
    # Evenly spread, not one set after the other.
    names = [s.dataset for s in steps[:14]]
    assert names.index("toy~s1") < 8
    assert max(i for i, n in enumerate(names) if n == "toy") > 10


def test_world_workers_micro_batch_and_start_do_not_change_the_global_batches(mixed: Source):
    def per_step(stream: TrainLoader, start: int = 0) -> list[set[str]]:
        return [{k for b in s.batches for k in b.keys} for s in stream.steps(4 * start, 20)]

    whole = per_step(loader(mixed))
    halves = [per_step(loader(mixed, rank=r, world=2)) for r in range(2)]
    assert [a | b for a, b in zip(*halves, strict=True)] == whole
    assert per_step(loader(mixed), start=7) == whole[7:]
    stream = loader(mixed, workers=2, micro_batch=1)
    try:
        assert per_step(stream) == whole
    finally:
        stream.close()


def test_a_batch_is_replayed_from_its_keys(mixed: Source):
    stream = loader(mixed)
    for step in (s for s in stream.steps(0, 14) if s.dataset != "toy"):
        again = stream.replay(step.batches[0].keys)
        assert again.dataset == step.dataset
        assert set(again.pixels) == set(step.batches[0].pixels)
        for name, pixels in step.batches[0].pixels.items():
            assert (again.pixels[name] == pixels).all()


def test_tiles_with_more_sensors_replace_those_of_the_only_shard_of_a_set(mixed: Source, tmp_path: Path):
    """Five tiles lack s1 and s2, in one shard; it is damaged."""
    source = replace(
        mixed, store=Store(str(shutil.copytree(mixed.store.url, tmp_path / "d")), tmp_path / "c", 2**30)
    )
    (bad,) = [s for s in source.shards if len(s.absent) == 2]
    (tmp_path / "d" / bad.path).write_bytes(bytes(bad.bytes))
    streams = [loader(source, on_bad_shard="replace", rank=r, world=2, micro_batch=1) for r in (0, 1)]
    found = {}
    for stream in (*streams, loader(source, on_bad_shard="replace")):
        steps = [s for s in stream.steps(0, 14) if s.dataset == "toy~s2+s1"]
        for batch in (b for s in steps for b in s.batches):
            assert set(batch.pixels) == {"aerial"}
            assert all(re.fullmatch(r"0/toy~s2\+s1/\d~\d+@toy", key) for key in batch.keys)
            for i, key in enumerate(batch.keys):
                pixels = batch.pixels["aerial"][i].tolist()
                assert found.setdefault(key, pixels) == pixels  # on one rank as on two
            again = stream.replay(batch.keys)
            assert (again.pixels["aerial"] == batch.pixels["aerial"]).all()
    assert len(found) == 4
    # No other tiles have all sensors of the complete ones.
    for shard in (s for s in source.shards if not s.absent):
        (tmp_path / "d" / shard.path).write_bytes(bytes(shard.bytes))
    stream = loader(source, on_bad_shard="replace")
    with pytest.raises(BadShard, match="64 samples drawn in its place are bad too"):
        list(stream.steps(0, 14))


def test_complete_tiles_are_drawn_as_if_no_others_were_there(
    mixed: Source, tile_of: Callable[[int], Tile], tmp_path: Path
):
    with Writer(str(tmp_path / "shards"), SPEC, "train") as writer:
        writer._shard_bytes = 80_000
        for number in range(45):
            writer.add(tile_of(number))
    alone = opened(tmp_path, SPEC)
    theirs = [s for s in loader(mixed).steps(0, 14) if s.dataset == "toy"]
    for mine, other in zip(loader(alone).steps(0, 11), theirs, strict=True):
        for a, b in zip(mine.batches, other.batches, strict=True):
            assert a.keys == b.keys
            assert a.tiles == b.tiles
            for name in a.noise:
                assert (a.noise[name] == b.noise[name]).all()
                assert (a.pixels[name] == b.pixels[name]).all()
    # And the bytes are those of a dataset whose reader permits nothing to be missing.
    manifests = [
        json.loads((f / "shards" / "manifest.json").read_text()) for f in (tmp_path, mixed_folder(mixed))
    ]
    assert manifests[0]["spec"] == manifests[1]["spec"]
    assert manifests[0]["shards"] == [s for s in manifests[1]["shards"] if "absent" not in s]


def mixed_folder(source: Source) -> Path:
    return Path(source.store.url).parent


def test_sets_do_not_share_random_numbers(mixed: Source):
    stream = loader(mixed)
    noise = {}
    for step in stream.steps(0, 14):
        for batch in step.batches:
            for key, values in zip(batch.keys, batch.noise["aerial"], strict=True):
                noise[key] = values.numpy().tobytes()
    assert len(set(noise.values())) == len(noise) == 56


def test_a_tile_that_has_all_selected_sensors_is_complete(folder: Path):
    without_s1 = replace(SPEC, sensors=SPEC.sensors[:2])
    stream = loader(opened(folder, without_s1))
    assert list(stream.sources) == ["toy", "toy~s2"]
    assert [sum(s.counts) for s in stream.sources.values()] == [55, 5]
    only_aerial = loader(opened(folder, replace(SPEC, sensors=SPEC.sensors[:1])))
    assert list(only_aerial.sources) == ["toy"]
    assert only_aerial.steps_per_epoch == 15
    only_s1 = divide(opened(folder, replace(SPEC, sensors=SPEC.sensors[2:])), 4)
    assert only_s1.lines == ("15 tiles have none of the sensors in use and are left out",)
    assert [sum(s.counts) for s in only_s1.sources] == [45]


def test_two_entries_keep_their_weights_and_their_own_draws(mixed: Source, toy: Source):
    """100 complete tiles and 60 mixed ones, with weights 1 and 3."""
    stream = TrainLoader([replace(toy, weight=1.0), replace(mixed, weight=3.0)], 3, 2, 4, 2)
    assert list(stream.sources) == ["toy#0", "toy#1", "toy#1~s1", "toy#1~s2+s1"]
    names = [s.dataset for s in stream.steps(0, 56)]
    assert collections.Counter(names) == {"toy#0": 14, "toy#1": 33, "toy#1~s1": 6, "toy#1~s2+s1": 3}


def test_the_schedule_of_parts_is_exact_in_every_epoch():
    mixture = NestedMixture([0.1, 0.3], [[7], [5, 2, 1]])
    found = [mixture.at(step) for step in range(320)]
    for first in range(0, 320, 32):  # 8 steps of the first dataset, 24 of the second: three of its epochs
        counts = collections.Counter(part for part, _ in found[first : first + 32])
        assert counts == {0: 8, 1: 15, 2: 6, 3: 3}
    for part in range(4):  # and every part counts its own steps
        assert [n for p, n in found if p == part] == list(range(sum(p == part for p, _ in found)))


def shard(number: int, samples: int, *absent: str) -> ShardInfo:
    return ShardInfo(f"train-{number:06d}.tar", "train", 10_000, samples, f"{number:064x}", absent)


def source_of(*shards: ShardInfo) -> Source:
    return Source(SPEC, shards, store=None)


def used(source: Source) -> list[tuple[str, list[int]]]:
    indices = source.indices or [range(s.samples) for s in source.shards]
    return [(s.path[6:12].lstrip("0"), list(i)) for s, i in zip(source.shards, indices, strict=True)]


def test_a_small_set_is_completed_with_the_last_tiles_of_one_that_has_its_sensors():
    division = divide(source_of(shard(1, 10), shard(2, 9), shard(3, 3, "s1")), 8)
    first, second = division.sources
    assert first.absent == ()
    assert used(first) == [("1", list(range(10))), ("2", [0, 1, 2, 3])]
    assert second.absent == ("s1",)
    assert used(second) == [("3", [0, 1, 2]), ("2", [4, 5, 6, 7, 8])]
    assert division.lines == (
        "3 tiles without s1 are completed to a global batch with 5 tiles whose s1 are not read",
    )


def test_the_way_that_leaves_the_fewest_images_unread_completes_a_small_set():
    # 1 tile without s2, 2 without s2 and s1. Together they lose 1 image of s1; completed alone, from complete tiles,
    # the first would lose 7 of s2.
    division = divide(source_of(shard(1, 30), shard(2, 1, "s2"), shard(3, 2, "s2", "s1")), 8)
    assert [(s.absent, sum(s.counts)) for s in division.sources] == [((), 25), (("s2", "s1"), 8)]
    assert division.lines[0] == (
        "1 tiles without s2 and 2 without s2, s1 are less than a global batch: they are read together, without s2, s1"
    )
    assert sum(sum(s.counts) for s in division.sources) == 33


def test_a_few_tiles_that_have_more_sensors_are_read_as_those_that_have_fewer():
    # As places with both products of a corpus whose other places have one: no set has all of their sensors.
    shards = (shard(1, 2), shard(2, 30, "s1"), shard(3, 20, "s2"))
    division = divide(source_of(*shards), 8)
    assert [(s.absent, used(s)) for s in division.sources] == [
        (("s1",), [("1", [0, 1]), ("2", list(range(30)))]),
        (("s2",), [("3", list(range(20)))]),
    ]
    assert division.lines == (
        "2 tiles with all sensors are less than a global batch: they are read as those without s1",
    )


def test_a_small_set_that_nothing_can_complete_is_refused_with_a_line():
    for shards in (
        (shard(1, 12), shard(2, 3, "s1")),  # 7 complete tiles would be left: less than a global batch
        (shard(1, 30, "s1"), shard(2, 3, "s2")),  # no set has all sensors of the second
    ):
        with pytest.raises(
            SampleOrderError, match=r"3 tiles without s[12] are less than a global batch of 8"
        ) as e:
            divide(source_of(*shards), 8)
        assert "\n" not in str(e.value)
        assert "leave_out" in str(e.value)
    left, count = complete(source_of(shard(1, 12), shard(2, 3, "s1")))
    assert count == 3
    assert [s.samples for s in left.shards] == [12]


def test_a_dataset_smaller_than_a_global_batch_is_repeated_as_before(mixed: Source, caplog):
    alone = replace(mixed, shards=tuple(s for s in mixed.shards if s.absent == ("s2", "s1")))
    stream = loader(alone, global_batch=8, micro_batch=8)
    assert list(stream.sources) == ["toy~s2+s1"]
    assert stream.steps_per_epoch == 1
    assert "5 samples, fewer than the global batch 8" in caplog.text


@pytest.mark.parametrize("world", [1, 3])
def test_every_tile_is_evaluated_once_in_batches_of_one_set(mixed: Source, world: int):
    loaders = [EvalLoader(mixed, 4, rank, world) for rank in range(world)]
    batches = [batch for one in loaders for batch in one]
    whole = list(EvalLoader(mixed, 4))
    assert [b.keys for b in batches] == [b.keys for b in whole]
    assert [int(k.split("/")[2]) for b in whole for k in b.keys] == [i for i in range(60) for _ in range(4)]
    assert all(len({absent_of(int(t[5:])) for t in b.tiles}) == 1 for b in whole)
    assert [one.first_row for one in loaders] == [
        sum(len(b) for o in loaders[:rank] for b in o) for rank in range(world)
    ]
    absent = loaders[0].absent_of_items()
    tiles = [t for b in whole for t in b.tiles]
    assert absent.tolist() == ["+".join(absent_of(int(t[5:]))) for t in tiles]


def test_a_tile_without_any_sensor_in_use_is_not_skipped_in_an_evaluation(folder: Path):
    with pytest.raises(SampleOrderError, match="15 tiles have none of the sensors s1"):
        EvalLoader(opened(folder, replace(SPEC, sensors=SPEC.sensors[2:])), 4)


def test_a_manifest_that_says_less_than_is_missing_is_an_error(mixed: Source):
    wrong = replace(mixed, shards=tuple(replace(s, absent=()) for s in mixed.shards))
    with pytest.raises(BadShard, match="has no field 's"):
        list(EvalLoader(wrong, 4))


def test_runs_of_interleaved_shards():
    source = source_of(shard(1, 2), shard(2, 3), shard(3, 1, "s1"), shard(4, 2), shard(5, 2, "s1"))
    assert list(runs(source)) == [((), 5), (("s1",), 1), ((), 2), (("s1",), 2)]
    assert np.sum([n for _, n in runs(source)]) == 10


def test_a_part_of_a_split_has_tiles_of_every_set_in_proportion():
    source = source_of(shard(1, 8), shard(2, 4), shard(3, 6, "s1"), shard(4, 2, "s2"))
    assert proportional(source, 10).tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 18]
    assert proportional(source, 3).tolist() == [0, 12, 18]
    assert proportional(source, 99).tolist() == list(range(20))
    # Two splits, each with its own shards of a set.
    source = source_of(shard(1, 2), shard(2, 2, "s1"), shard(3, 2), shard(4, 2, "s1"))
    assert proportional(source, 4).tolist() == [0, 1, 2, 3]
    assert proportional(source, 6).tolist() == [0, 1, 2, 3, 4, 6]
    assert proportional(source_of(shard(1, 5), shard(2, 5)), 7).tolist() == list(range(7))

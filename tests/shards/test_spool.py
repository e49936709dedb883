"""Datasets that are read in runs: the shards are those of any other order, temporary files disappear."""

from __future__ import annotations

from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from shards.kit import TILE_BYTES, Toy, toy_keys

from maestro_scale.datasets.spec import DatasetError, LeftOut
from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write import spool, writer
from maestro_scale.shards.write.packing import shuffle_keys
from maestro_scale.shards.write.writer import write_shards

SMALL = 4 * TILE_BYTES / 1e6
READS: list[str] = []


class InRuns(Toy):
    """Tiles in runs of three, which may be read within their run only."""

    current: tuple[str, ...] = ()

    def runs(self, keys):
        ordered = sorted(keys)
        return [ordered[i : i + 3] for i in range(0, len(ordered), 3)]

    @contextmanager
    def run(self, keys):
        self.current = tuple(keys)
        yield
        self.current = ()

    def read(self, key):
        if self.current:
            READS.append(key)
        return super().read(key)


class WithRule(InRuns):
    def read(self, key):
        if key == sorted(self.keys())[4]:
            raise LeftOut(f"tile {key}: has few valid pixels", "few valid pixels")
        return super().read(key)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_shards_are_those_of_any_order(tmp_path, workers):
    write_shards(Toy(12), str(tmp_path / "a"), "train", shard_mb=SMALL)
    READS.clear()
    done = []
    write_shards(
        InRuns(12),
        str(tmp_path / "b"),
        "train",
        shard_mb=SMALL,
        workers=workers,
        progress=lambda *n: done.append(n),
    )
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert done[-1][:2] == (12, 12)
    if workers == 1:
        assert sorted(READS) == READS
        assert len(READS) == 12


def test_a_small_disk_is_filled_in_rounds(tmp_path, monkeypatch):
    write_shards(Toy(12), str(tmp_path / "a"), "train", shard_mb=SMALL)
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda path: Usage(0))
    READS.clear()
    write_shards(InRuns(12), str(tmp_path / "b"), "train", shard_mb=SMALL)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(READS) != READS


def test_what_a_rule_leaves_out_is_counted_also_if_strict(tmp_path):
    manifest = write_shards(WithRule(12), str(tmp_path / "a"), "train", shard_mb=SMALL, strict=True)
    assert manifest.notes["left out: few valid pixels"] == 1
    assert "has few valid pixels" in manifest.examples["left out: few valid pixels"]
    assert sum(s.samples for s in manifest.shards) == 11
    assert verify(str(tmp_path / "a")) == []
    again = write_shards(WithRule(12), str(tmp_path / "a"), "train", shard_mb=SMALL, strict=True)
    assert again == manifest


@dataclass(frozen=True)
class Sparse(Toy):
    """Tiles of which a rule leaves out all but ``kept``. Counts reads."""

    kept: frozenset[str] = frozenset()

    def read(self, key):
        READS.append(key)
        if key not in self.kept:
            raise LeftOut(f"tile {key}: has few valid pixels", "few valid pixels")
        return super().read(key)


def test_shards_of_a_grid_that_is_mostly_empty_have_the_usual_size(tmp_path):
    order = shuffle_keys(toy_keys(400), 0)
    kept = Sparse(400, kept=frozenset(order[9::10]))
    manifest = write_shards(kept, str(tmp_path), "train", shard_mb=0.08)
    # 40 tiles, of about 9 kB with their headers.
    assert 4 <= len(manifest.shards) <= 5
    assert all(60_000 <= s.bytes <= 120_000 for s in manifest.shards)
    assert manifest.notes["left out: few valid pixels"] == 360


def test_a_split_whose_first_tiles_are_left_out_by_a_rule_is_written(tmp_path):
    order = shuffle_keys(toy_keys(310), 0)
    manifest = write_shards(Sparse(310, kept=frozenset(order[300:])), str(tmp_path), "train")
    assert [s.samples for s in manifest.shards] == [10]


def test_few_tiles_are_tried_before_the_shards_are_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_PROBED_LEFT_OUT", 5)
    order = shuffle_keys(toy_keys(12), 0)
    READS.clear()
    manifest = write_shards(Sparse(12, kept=frozenset(order[10:])), str(tmp_path), "train")
    assert [s.samples for s in manifest.shards] == [2]
    assert [*order[:5], *order] == READS


@pytest.mark.parametrize("limit", [5, 1000])
def test_nothing_stays_where_a_rule_leaves_out_every_tile(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(writer, "_PROBED_LEFT_OUT", limit)
    with pytest.raises(WriteError, match="nothing is written") as raised:
        write_shards(Sparse(12), str(tmp_path), "train")
    assert "few valid pixels" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_after_a_failure(tmp_path):
    key = sorted(Toy(12).keys())[7]
    with pytest.raises(DatasetError, match="is truncated"):
        write_shards(InRuns(12, broken=(key,)), str(tmp_path), "train", shard_mb=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_files_that_the_next_writer_removes(tmp_path):
    write_shards(InRuns(12), str(tmp_path), "train", shard_mb=SMALL)
    left = tmp_path / ".train-000000.tar.spool.123.tmp"
    left.write_bytes(b"x")
    write_shards(InRuns(12), str(tmp_path), "train", shard_mb=SMALL)
    assert not left.exists()


def test_a_full_disk_is_told(tmp_path):
    def encode(key):
        raise OSError(28, "No space left on device")

    writing = spool.spooled(InRuns(3), encode, Toy(3).keys(), tmp_path / ".x", 1, lambda *n: None)
    with pytest.raises(WriteError, match="No space left on device\\); free some disk space"), writing:
        pass

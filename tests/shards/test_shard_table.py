"""The shards of a dataset as columns, and manifests that are parsed once per node."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from shards.kit import SPEC

from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format import manifest as manifest_module
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.format.serialization import to_builtins
from maestro_scale.shards.format.shard_table import ShardInfo, ShardTable
from maestro_scale.shards.read.manifest_cache import load_manifest, mapped_manifest

A = ShardInfo("train-000000.tar", "train", 10, 1, "0" * 64)
B = ShardInfo("b/ü.tar", "val", 2**40, 250_000, "f" * 64, ("s1_asc",))
C = ShardInfo("train-000001.tar", "train", 30, 3, "2" * 64)
MANIFEST = Manifest(1, SPEC, (A, B, C), {"odd": 3}, "zstd", {"numpy": "2"}, 7, {"odd": "x"}, True)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text(replace(MANIFEST, shards=(A, C)).dumps())
    return str(tmp_path / "shards")


def test_a_table_is_the_sequence_of_its_shards():
    table = ShardTable.of((A, B, C))
    assert list(table) == [A, B, C]
    assert [table[0], table[1], table[-1]] == [A, B, C]
    assert table == (A, B, C)
    assert table != (A, B)
    assert len(table) == 3
    assert table.samples.tolist() == [1, 250_000, 3]
    assert table.bytes.tolist() == [10, 2**40, 30]
    assert (table.splits, table.absents) == (("train", "val"), ((), ("s1_asc",)))
    assert table.absent_ids.tolist() == [0, 1, 0]
    assert list(table[1:]) == [B, C]
    assert list(table[::2]) == [A, C]
    assert list(table.take(np.array([2, 0]))) == [C, A]
    assert list(table.take(np.array([], np.int64))) == []
    assert list(table.of_splits(("val", "train"))) == [B, A, C]
    with pytest.raises(KeyError):
        table.of_splits(("test",))
    with pytest.raises(IndexError):
        table[3]
    assert list(ShardTable.of(())) == []
    assert table.as_dicts() == to_builtins((A, B, C))
    assert table[1:].as_dicts() == to_builtins((B, C))


@pytest.mark.parametrize("part", [slice(None), slice(1, 3), slice(0, 3, 2)])
@pytest.mark.parametrize("dumps", [pickle.dumps, lambda value: bytes(ForkingPickler.dumps(value))])
def test_a_table_survives_pickling(part, dumps):
    table = ShardTable.of((A, B, C))[part]
    again = pickle.loads(dumps(table))
    assert list(again) == [A, B, C][part]
    assert again.of_splits(("train",)) == [s for s in [A, B, C][part] if s.split == "train"]


def test_a_mapped_manifest_is_the_parsed_one(tmp_path, dataset):
    plain = Manifest.load(dataset)
    for _ in range(2):  # parsed, then mapped
        found = load_manifest(dataset, tmp_path / "cache")
        assert isinstance(found.shards, ShardTable)
        assert replace(found, shards=tuple(found.shards)) == plain
        assert (found.digest, found.content_digest) == (plain.digest, plain.content_digest)
        assert found.digest_of(["train"]) == plain.digest_of(["train"])
        assert found.dumps() == plain.dumps()
        assert found.splits == ("train",)
        assert found.shards_of(["train"]) == (A, C)
        with pytest.raises(ManifestError, match="has no split 'x' in shards; there are: train"):
            found.shards_of(["x"])
    assert [p.name for p in (tmp_path / "cache" / "manifests").iterdir()] == [f"{plain.digest}.v1"]


def test_a_mapped_manifest_is_handed_over_as_the_name_of_its_file(tmp_path, dataset):
    table = load_manifest(dataset, tmp_path / "cache").shards
    for part in (table, table[1:2], table.of_splits(("train",))):
        assert b"manifests" in pickle.dumps(part)
        assert b"000001.tar" not in pickle.dumps(part)
        assert list(pickle.loads(pickle.dumps(part))) == list(part)
        assert list(pickle.loads(pickle.dumps(part[1:]))) == list(part)[1:]
    assert list(pickle.loads(pickle.dumps(table[::2]))) == [A]


@pytest.fixture
def parses(monkeypatch):
    """The manifests that are parsed."""
    found = []
    real = manifest_module.parse_versioned
    monkeypatch.setattr(
        manifest_module, "parse_versioned", lambda *args: found.append(args[1]) or real(*args)
    )
    return found


def test_a_manifest_is_parsed_once_and_a_changed_one_again(tmp_path, dataset, parses):
    for _ in range(3):
        load_manifest(dataset, tmp_path / "cache")
    assert len(parses) == 1
    path = tmp_path / "shards" / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))
    assert load_manifest(dataset, tmp_path / "cache").seed == 8
    assert len(parses) == 2
    (tmp_path / "shards" / "manifest.sha256").write_text(f"{'0' * 64}  manifest.json\n")
    with pytest.raises(ManifestError, match="was changed or damaged after it was published"):
        load_manifest(dataset, tmp_path / "cache")


def test_a_damaged_file_is_never_used(tmp_path, dataset, parses, caplog):
    digest = load_manifest(dataset, tmp_path / "cache").digest
    path = tmp_path / "cache" / "manifests" / f"{digest}.v1"
    data = path.read_bytes()
    for changed in (b"", data[:-1], *(_flipped(data, at) for at in range(8, len(data), 97))):
        path.write_bytes(changed)
        assert mapped_manifest(tmp_path / "cache", digest) is None
        assert "is damaged and written again" in caplog.text
    parses.clear()
    assert load_manifest(dataset, tmp_path / "cache").shards == (A, C)
    assert path.read_bytes() == data
    assert len(parses) == 1


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_kill_while_it_is_written_leaves_no_file_of_its_name(tmp_path, dataset, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            load_manifest(dataset, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "manifests").glob("*.v1"))
    assert load_manifest(dataset, tmp_path / "cache").shards == (A, C)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, dataset, caplog):
    (tmp_path / "cache").write_text("a file")
    assert load_manifest(dataset, tmp_path / "cache").shards == (A, C)
    assert "the parsed manifest cannot be kept" in caplog.text


def test_files_that_nobody_has_used_for_a_month_are_removed(tmp_path, dataset):
    folder = tmp_path / "cache" / "manifests"
    folder.mkdir(parents=True)
    for name, age_s in (("old.v1", 31 * 86400), ("recent.v1", 29 * 86400)):
        (folder / name).touch()
        used = (folder / name).stat().st_mtime - age_s
        os.utime(folder / name, (used, used))
    digest = load_manifest(dataset, tmp_path / "cache").digest
    assert sorted(p.name for p in folder.iterdir()) == sorted([f"{digest}.v1", "recent.v1"])
    os.utime(folder / f"{digest}.v1", (1, 1))
    load_manifest(dataset, tmp_path / "cache")
    assert (folder / f"{digest}.v1").stat().st_mtime > 1


def test_the_rules_for_specs_hold_for_a_mapped_manifest_too(tmp_path, dataset):
    """The spec is checked again: a later revision may have other rules."""
    from maestro_scale.shards.read import manifest_cache

    digest = load_manifest(dataset, tmp_path / "cache").digest
    assert mapped_manifest(tmp_path / "cache", digest) is not None
    path = tmp_path / "cache" / "manifests" / f"{digest}.v1"
    manifest = Manifest.load(dataset)
    broken = replace(manifest, spec=replace(manifest.spec, modalities=()))
    broken.__dict__["digest"] = digest
    manifest_cache._write(path, broken)
    assert mapped_manifest(tmp_path / "cache", digest) is None
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["format_version"] == 1

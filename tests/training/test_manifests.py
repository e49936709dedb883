"""The ranks of a job have read the same manifests, and a manifest that changes while a job runs is reported."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from shards.kit import SPEC

from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.training.binding import Launch
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.distributed import exchange_texts, free_port
from maestro_scale.training.hooks.manifests import ManifestHook
from maestro_scale.training.job_store import RendezvousError
from maestro_scale.training.manifests import (
    ManifestMismatchError,
    ManifestMonitor,
    UsedDataset,
    compare_digests,
    compare_manifests,
    compare_manifests_of_launch,
)

TRAIN = ShardInfo("train-000000.tar", "train", 10, 1, "0" * 64)
VAL = ShardInfo("val-000000.tar", "val", 10, 2, "1" * 64)


def test_ranks_with_other_manifests_are_named():
    a, b = "a" * 64, "b" * 64
    compare_digests([json.dumps({"toy": a, "other": b})] * 3)
    ranks = [json.dumps({"other": b, "toy": digest}) for digest in (a, a, b, a, a)]
    with pytest.raises(ManifestMismatchError) as error:
        compare_digests(ranks)
    assert str(error.value) == (
        "toy: the ranks have read different manifests (SHA-256 of manifest.json of ranks 0-1, 3-4: aaaaaaaaaaaa, "
        "rank 2: bbbbbbbbbbbb); give all nodes the same shards, then start again"
    )
    assert error.value.same_on_all_ranks
    with pytest.raises(ManifestMismatchError, match=r"toy: .* rank 1: none"):
        compare_digests([json.dumps({"toy": a}), json.dumps({"other": b})])


def test_each_rank_compares_the_digest_of_its_own_file(tmp_path):
    mine = Manifest(1, SPEC, (TRAIN,))
    used = [UsedDataset("toy", str(tmp_path), mine, ("train",))]
    other = replace(mine, seed=1).digest
    compare_manifests(None, used)
    compare_manifests(SimpleNamespace(size=2, gather=lambda text: [text, text]), used)
    with pytest.raises(ManifestMismatchError, match=f"rank 0: {mine.digest[:12]}, rank 1: {other[:12]}"):
        compare_manifests(
            SimpleNamespace(size=2, gather=lambda text: [text, json.dumps({"toy": other})]), used
        )


def test_ranks_that_work_independently_compare_where_they_can_meet(monkeypatch, tmp_path):
    used = [UsedDataset("toy", str(tmp_path), Manifest(1, SPEC, (TRAIN,)), ("train",))]
    launch = SimpleNamespace(size=2, rank=0)
    monkeypatch.setattr(
        "maestro_scale.training.manifests.exchange_texts",
        lambda launch, text: [text, json.dumps({"toy": "c"})],
    )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    compare_manifests_of_launch(launch, used)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    with pytest.raises(ManifestMismatchError, match="rank 1: c"):
        compare_manifests_of_launch(launch, used)


def test_a_manifest_that_changes_meanwhile_is_reported_once(tmp_path):
    started = Manifest(1, SPEC, (TRAIN,))
    path = tmp_path / "manifest.json"
    path.write_text(started.dumps())
    warnings: list[str] = []
    monitor = ManifestMonitor(
        [UsedDataset("toy", str(tmp_path), Manifest.load(str(tmp_path)), ("train",))], warnings.append
    )
    hook = ManifestHook(monitor, SimpleNamespace(is_main=True))

    def check() -> list[str]:
        warnings.clear()
        hook.after_commit(Position())
        return list(warnings)

    assert check() == []
    path.write_text(replace(started, shards=(TRAIN, VAL)).dumps())  # another split was added
    assert check() == [
        f"{path}: the manifest of toy has changed while this job runs, which continues with the manifest that it "
        f"started with (SHA-256 {started.digest[:12]}); what the job uses is the same in both"
    ]
    assert check() == []
    path.write_text(started.dumps().replace('"divisor": 255', '"divisor": 256'))
    (warning,) = check()
    assert warning.endswith("; restore it before you start the job again, which will read the new one")
    path.write_text("{")
    assert "has changed and cannot be used" in check()[0]
    path.unlink()
    assert "the manifest of toy was removed" in check()[0]
    path.write_text(started.dumps())
    assert check() == []
    path.unlink()
    ManifestHook(monitor, SimpleNamespace(is_main=False)).after_commit(Position())
    assert warnings == []


def test_a_store_that_does_not_answer_is_not_a_change(monkeypatch, tmp_path):
    path = tmp_path / "manifest.json"
    path.mkdir()  # cannot be read as a file
    warnings: list[str] = []
    used = UsedDataset("toy", str(tmp_path), Manifest(1, SPEC, (TRAIN,)), ("train",))
    ManifestMonitor([used], warnings.append).check()
    assert warnings == []
    shutil.rmtree(path)


def test_ranks_without_a_process_group_exchange_texts(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("maestro_scale.training.job_store._current", None)  # restored at the end
    with ThreadPoolExecutor(2) as threads:  # of one process, as two would take seconds to start
        ranks = [
            threads.submit(exchange_texts, Launch("environment", rank, 2, rank, 2), f"text of {rank}", 60)
            for rank in (0, 1)
        ]
        assert [rank.result() for rank in ranks] == [["text of 0", "text of 1"]] * 2
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RendezvousError, match="rank 0 did not start within 1 s") as error:
        exchange_texts(Launch("environment", 1, 2, 1, 2), "text", 1.0)
    assert "\n" not in str(error.value)

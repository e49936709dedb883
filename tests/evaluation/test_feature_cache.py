"""Cached features: one forward pass per crop and encoder; an incomplete cache is encoded again."""

import dataclasses
import errno
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.features import cache as module
from maestro_scale.evaluation.features.cache import ConcatArray
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.write.writer import Writer
from maestro_scale.training.checkpoint import commit
from tests.evaluation.conftest import FIELDS, SPLITS, field_tile

CROPS_PER_TILE = 4


@pytest.fixture
def encoder(fields):
    """The untrained encoder, and a list that grows with the batch size of each forward pass."""
    model, passes = load_model(fields.model), []
    inner = model.encode

    def counted(batch):
        passes.append(len(batch))
        return inner(batch)

    model.encode = counted
    return model, passes


@pytest.fixture
def benchmark(fields, tmp_path):
    return Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")


def numbers(result):
    return result.value, result.per_class, result.confusion, result.interval, result.chosen


def test_a_second_run_and_other_modes_make_no_forward_pass(encoder, benchmark):
    model, passes = encoder
    (first,) = evaluate_frozen(model, benchmark, ["probe"])
    assert sum(passes) == CROPS_PER_TILE * sum(SPLITS.values())
    passes.clear()
    again, knn = evaluate_frozen(model, benchmark, ["probe", "knn"])
    assert passes == []
    assert numbers(again) == numbers(first)
    assert knn.mode == "knn"


def test_features_of_another_precision_are_encoded_again_but_a_cpu_has_one_only(
    encoder, benchmark, monkeypatch
):
    model, passes = encoder
    evaluate_frozen(model, benchmark, ["knn"], precision="fp32")
    before = {p.name for p in benchmark.features_dir.iterdir()}
    passes.clear()
    for precision in ("auto", "bf16", "bf16_weights"):
        evaluate_frozen(model, benchmark, ["knn"], precision=precision)
    assert passes == []
    monkeypatch.setattr("maestro_scale.evaluation.frozen.evaluate.eval_precision", lambda *args: "bf16")
    evaluate_frozen(model, benchmark, ["knn"], precision="bf16")
    assert sum(passes) == CROPS_PER_TILE * sum(SPLITS.values())
    names = {p.name for p in benchmark.features_dir.iterdir() if not p.name.startswith(".")}
    assert len(names) == 6
    assert names > {name for name in before if not name.startswith(".")}


def test_splits_that_take_other_parts_are_not_encoded_again(encoder, benchmark):
    model, passes = encoder
    evaluate_frozen(model, benchmark, ["probe"])
    passes.clear()
    turned = dataclasses.replace(
        benchmark, splits={"train": ("test", "val"), "val": ("val",), "test": ("train", "test")}
    )
    probe, knn = evaluate_frozen(model, turned, ["probe", "knn"])
    assert passes == []
    assert probe.num_tiles == knn.num_tiles == SPLITS["train"] + SPLITS["test"]
    alone = dataclasses.replace(turned, splits={**turned.splits, "test": ("test",)})
    (of_test,) = evaluate_frozen(model, alone, ["probe"])
    whole, part = np.array(probe.confusion), np.array(of_test.confusion)
    assert (whole >= part).all()
    assert whole.sum() > part.sum()


def test_joined_arrays_equal_their_concatenation():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 5, 3)) for n in (4, 1, 7)]
    whole, seen = np.concatenate(parts), ConcatArray(parts)
    assert (seen.shape, len(seen), seen.dtype) == (whole.shape, 12, whole.dtype)
    rows, places = rng.integers(0, 12, 40), rng.integers(0, 5, 40)
    for key in (slice(3, 9), slice(0, 12), slice(11, 40), rows, (rows, places)):
        np.testing.assert_array_equal(seen[key], whole[key])
    np.testing.assert_array_equal(np.asarray(seen), whole)
    np.testing.assert_array_equal(np.asarray(seen, np.float32), whole.astype(np.float32))


def test_other_weights_are_encoded_again(encoder, benchmark):
    model, passes = encoder
    evaluate_frozen(model, benchmark, ["knn"])
    passes.clear()
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    evaluate_frozen(model, benchmark, ["knn"])
    assert sum(passes) == CROPS_PER_TILE * sum(SPLITS.values())


@pytest.mark.parametrize("damage", ["marker", "zeros", "short", "labels"])
def test_a_split_that_is_not_what_was_written_is_encoded_again(encoder, benchmark, damage, caplog):
    model, passes = encoder
    (first,) = evaluate_frozen(model, benchmark, ["knn"])
    (test,) = benchmark.features_dir.glob("test-*")
    if damage == "marker":
        (test / commit.MARKER).unlink()
    elif damage == "zeros":
        np.load(test / "features.npy", mmap_mode="r+")[:] = 0
    elif damage == "short":
        with (test / "features.npy").open("r+b") as file:
            file.truncate(1000)
    else:
        (test / "labels.npy").unlink()
    passes.clear()
    (again,) = evaluate_frozen(model, benchmark, ["knn"])
    assert sum(passes) == CROPS_PER_TILE * SPLITS["test"]
    assert "is encoded again" in caplog.text
    assert numbers(again) == numbers(first)
    assert sorted(p.name.partition("-")[0] for p in benchmark.features_dir.iterdir()) == [
        "test",
        "train",
        "val",
    ]


def test_features_of_other_splits_or_weights_are_not_accepted_under_another_name(encoder, benchmark, caplog):
    """Folders that were swapped, or copied over another: complete and unchanged, but not what their names say."""
    model, passes = encoder
    (first,) = evaluate_frozen(model, benchmark, ["knn"])
    (train,), (test,), (val,) = (benchmark.features_dir.glob(f"{s}-*") for s in ("train", "test", "val"))
    aside = benchmark.features_dir / "aside"
    for source, target in ((train, aside), (test, train), (aside, test)):
        source.rename(target)
    passes.clear()
    (again,) = evaluate_frozen(model, benchmark, ["knn"])
    assert numbers(again) == numbers(first)
    assert sum(passes) == CROPS_PER_TILE * (SPLITS["train"] + SPLITS["test"])
    messages = [r.getMessage() for r in caplog.records if "encoded again" in r.getMessage()]
    assert [m.partition(" is encoded")[0] for m in messages] == [str(train), str(test)]
    assert "it was computed from other inputs (data: " in messages[0]
    assert "split: 'test', now 'train'" in messages[0]
    assert f"rows: {CROPS_PER_TILE * SPLITS['test']}, now {CROPS_PER_TILE * SPLITS['train']}" in messages[0]

    caplog.clear()
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    evaluate_frozen(model, benchmark, ["knn"])
    (other,) = set(benchmark.features_dir.glob("val-*")) - {val}
    assert "encoded again" not in caplog.text  # other weights have folders of their own
    shutil.rmtree(other)
    shutil.copytree(val, other)
    evaluate_frozen(model, benchmark, ["knn"])
    assert "weights: '" in caplog.text


def test_features_without_a_record_of_their_inputs_are_encoded_again(encoder, benchmark, caplog):
    model, passes = encoder
    evaluate_frozen(model, benchmark, ["knn"])
    (val,) = benchmark.features_dir.glob("val-*")
    content = commit.read(val)
    files = content.pop("files")
    commit.commit(val, {"rows": content["rows"]}, files)  # as earlier revisions wrote it
    passes.clear()
    evaluate_frozen(model, benchmark, ["knn"])
    assert sum(passes) == CROPS_PER_TILE * SPLITS["val"]
    assert "it does not record what it was computed from" in caplog.text
    passes.clear()
    evaluate_frozen(model, benchmark, ["knn"])
    assert passes == []


def test_a_marker_that_lists_no_files_does_not_make_features(encoder, benchmark, caplog):
    model, passes = encoder
    evaluate_frozen(model, benchmark, ["knn"])
    (val,) = benchmark.features_dir.glob("val-*")
    content = commit.read(val)
    del content["files"], content["format_version"]
    commit.commit(val, content, {})
    (val / "features.npy").unlink()
    passes.clear()
    evaluate_frozen(model, benchmark, ["knn"])
    assert sum(passes) == CROPS_PER_TILE * SPLITS["val"]
    assert "does not list features.npy and labels.npy" in caplog.text


def test_jobs_that_want_the_same_features_at_once_encode_them_once(fields, benchmark):
    """The second begins while the first is at it, and waits; it would not be waited for here were it not to."""
    entered, go, passes, found = threading.Event(), threading.Event(), [], {}

    def evaluate(name):
        model = load_model(fields.model)
        inner = model.encode

        def encode(batch):
            passes.append(name)
            entered.set()
            assert go.wait(60)
            return inner(batch)

        model.encode = encode
        (found[name],) = evaluate_frozen(model, benchmark, ["probe"])

    jobs = [threading.Thread(target=evaluate, args=(name,)) for name in "ab"]
    jobs[0].start()
    assert entered.wait(60)
    jobs[1].start()
    time.sleep(1)
    go.set()
    for job in jobs:
        job.join(120)
    assert set(passes) == {"a"}
    assert numbers(found["a"]) == numbers(found["b"])


def test_a_job_that_dies_over_features_leaves_no_trace_of_them(fields, benchmark):
    model, calls = load_model(fields.model), []
    inner = model.encode

    def encode(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(batch)

    model.encode = encode
    with pytest.raises(KeyboardInterrupt):
        evaluate_frozen(model, benchmark, ["knn"])
    assert list(benchmark.features_dir.iterdir()) == []


@pytest.mark.slow
def test_other_data_crops_and_targets_have_separate_features(fields, encoder, benchmark, tmp_path):
    """Under one address, one after the other: the key of the features holds all that they depend on."""
    model, passes = encoder
    moved = dataclasses.replace(benchmark, shards=str(tmp_path / "shards"))
    for seed in (0, 50):
        shutil.rmtree(moved.shards, ignore_errors=True)
        first = seed
        for split, count in SPLITS.items():
            with Writer(moved.shards, FIELDS, split) as writer:
                for number in range(first, first + count):
                    writer.add(field_tile(number))
            first += count
        passes.clear()
        evaluate_frozen(model, moved, ["knn"])
        assert sum(passes) == CROPS_PER_TILE * sum(SPLITS.values())
    passes.clear()
    evaluate_frozen(model, moved, ["attentive"])
    assert sum(passes) == CROPS_PER_TILE * sum(SPLITS.values())
    keys = {p.name for p in benchmark.features_dir.iterdir()}
    config = dataclasses.replace(model.config, crop_m=20.0)
    view = [dataclasses.replace(s, image_size=s.image_size // 2) for s in FIELDS.sensors]
    smaller = Maestro(dataclasses.replace(config, sensors=tuple(view), pos_grid=6)).initialise(0).eval()
    evaluate_frozen(
        smaller, dataclasses.replace(moved, spec=dataclasses.replace(FIELDS, crop_m=20.0)), ["knn"]
    )
    assert len({p.name for p in benchmark.features_dir.iterdir()} - keys) == 3


@pytest.mark.parametrize("factor", [float("nan"), 1e6])
def test_features_that_cannot_be_stored_are_reported(fields, benchmark, factor):
    model = load_model(fields.model)
    inner = model.encode
    model.encode = lambda batch: {k: factor * v for k, v in inner(batch).items()}
    why = "are not finite" if factor != factor else "more than float16 holds"
    for mode in ("knn", "attentive"):
        with pytest.raises(EvaluationError, match=why):
            evaluate_frozen(model, benchmark, [mode])


def test_too_little_free_space_is_reported_before_anything_is_written(encoder, benchmark, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(EvaluationError, match="GiB are free: free some, point --features"):
        evaluate_frozen(encoder[0], benchmark, ["knn"])
    assert not list(benchmark.features_dir.rglob("*.npy"))


def test_space_that_others_take_is_reported(encoder, benchmark, monkeypatch):
    def allocate(descriptor, offset, size):
        assert size > 100
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(EvaluationError, match="features need"):
        evaluate_frozen(encoder[0], benchmark, ["probe"])
    assert not [p for p in benchmark.features_dir.iterdir() if p.is_dir()]


def test_ignored_and_foreign_labels_count_nowhere(encoder, benchmark):
    (result,) = evaluate_frozen(encoder[0], benchmark, ["probe"])
    assert set(result.per_class) == {"wood", "meadow", "lake"}
    assert np.array(result.confusion).shape == (3, 3)
    assert np.array(result.confusion).sum() < 36 * SPLITS["test"]
    assert result.num_tiles == SPLITS["test"]


def test_an_untrained_encoder_already_separates_colours(fields, benchmark):
    (result,) = evaluate_frozen(load_model(fields.model), benchmark, ["probe"])
    assert result.metric == "miou"
    assert result.value > 0.85
    blind = load_model(fields.model)
    blind.encode = lambda batch: {k: torch.zeros_like(v) for k, v in Maestro.encode(blind, batch).items()}
    (chance,) = evaluate_frozen(
        blind, Benchmark(FIELDS, benchmark.shards, benchmark.cache_dir, benchmark.features_dir / "b")
    )[:1]
    assert chance.value < 0.35

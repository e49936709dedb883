"""results.json and counts.npz: a round trip, and refusal of undefined, unknown or malformed values."""

import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest

from maestro_scale import untrusted
from maestro_scale.evaluation import results
from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.results import VERSION, EvalResult, EvaluationError

RESULT = EvalResult(
    benchmark="treesatai_ts",
    metric="wf1",
    mode="probe",
    value=0.71,
    per_class={"Abies": 0.5, "Acer": None},
    interval=(0.68, 0.74),
    num_tiles=70,
    seeds=(0, 1),
    checkpoint_step=300,
    recipe={"name": "quickstart", "optim": {"betas": [0.9, 0.99]}},
    chosen={"l2": 0.1},
    timings={"encode_s": 3.5},
)


@pytest.mark.parametrize("confusion", [None, ((3, 1), (0, 2))])
def test_round_trip(tmp_path, confusion):
    result = dataclasses.replace(RESULT, confusion=confusion)
    path = tmp_path / "new" / "results.json"
    result.write(path)
    assert EvalResult.load(path) == result
    assert json.loads(path.read_text())["version"] == VERSION
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_undefined_scores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="per-class score of Acer is nan"):
        dataclasses.replace(RESULT, per_class={"Acer": float("nan")}).write(tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "format version None"),
        ('{"version": 99}', "format version 99, this maestro-scale reads 1"),
        ('{"version": 1, "value": 2, "colour": 3}', "benchmark, 'colour'"),
    ],
)
def test_foreign_files_are_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message) as error:
        EvalResult.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "contains NaN"),
        ({"interval": [float("nan"), 0.3]}, "contains NaN"),
        ({"value": None}, "value: is None, expected float"),
        ({"value": "0.5"}, "value: is '0.5', expected float"),
        ({"value": 50.0}, "value is 50.0, not a fraction of 1"),
        ({"interval": [0.5]}, "interval: has 1 entries, expected 2"),
        ({"metric": "acc"}, "metric 'acc' is not one of wf1, miou"),
        ({"seeds": []}, "no seed"),
        ({"per_class": [1, 2]}, "is malformed"),
        ({"per_class": {"a": 2}}, "per-class score of a is 2"),
        ({"confusion": [[1, 2, 3]]}, "the confusion has 1 rows for 2 classes"),
        ({"confusion": 3}, "is malformed"),
        ({"metric": "rmse", "per_class": {}, "confusion": None, "value": 1.7e308}, "too large for a score"),
        ({"deviation": 1.7e308}, "deviation is 1.7e.308, too large for a score"),
        (
            {"runs": [{"value": 0.5, "interval": [0.0, 1e300], "seed": 0, "fold": None, "path": ""}]},
            "run 0 is 1e.300, too large for a score",
        ),
        ({"recipe": {"a": [{"b": 0}] * 10_000}}, "the recipe has more than 20000 entries"),
    ],
)
def test_values_that_no_evaluation_writes_are_refused(tmp_path, change, message):
    path = tmp_path / "results.json"
    RESULT.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EvaluationError, match=message) as error:
        EvalResult.load(path)
    assert "evaluate again" in str(error.value)


@pytest.mark.parametrize("num_writes", [0, 1])
def test_a_kill_never_leaves_maps_beside_another_result(tmp_path, monkeypatch, num_writes):
    path = tmp_path / "results.json"
    maps = {name: np.zeros((1, 2, 2), np.uint8) for name in ("truth", "answer")}
    dataclasses.replace(RESULT, maps=maps).write(path)
    done = []

    def die_later(target, content):
        if len(done) == num_writes:
            raise KeyboardInterrupt
        done.append(target.write_bytes(content.encode() if isinstance(content, str) else content))

    monkeypatch.setattr(results, "write_atomically", die_later)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(RESULT, value=0.3, maps=maps).write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


KEYS = ("b", "a", "水/田\n", "\x00")
COUNTS = TileCounts(KEYS, np.arange(12).reshape(4, 3) * 100)
COUNTED = dataclasses.replace(RESULT, seeds=(0,), num_tiles=4, counts=COUNTS)


def test_counts_per_tile_are_written_beside_the_result_and_named_by_it(tmp_path):
    path = tmp_path / "results.json"
    COUNTED.write(path)
    content = (tmp_path / "counts.npz").read_bytes()
    assert json.loads(path.read_text())["counts_sha256"] == hashlib.sha256(content).hexdigest()
    loaded = EvalResult.load(path)
    assert loaded.counts is None
    counts = loaded.load_counts(path)
    assert counts.keys == KEYS
    assert counts.array.tolist() == [[0, 100, 200], [300, 400, 500], [600, 700, 800], [900, 1000, 1100]]
    assert counts.array.dtype == np.uint16
    assert counts.dumps() == content
    RESULT.write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([[True], [False]], np.uint8),
        ([[0.0], [255.0]], np.uint8),
        ([[0], [256]], np.uint16),
        ([[70_000], [1]], np.uint32),
        ([[-1], [127]], np.int8),
        ([[-1], [128]], np.int16),
        ([[0.5], [1.0]], np.float64),
    ],
)
def test_counts_have_the_smallest_type_that_holds_them(values, dtype):
    read = TileCounts.loads(TileCounts(("a", "b"), np.array(values)).dumps())
    assert read.array.dtype == dtype
    assert read.array.tolist() == np.array(values).tolist()


def test_counts_without_a_number_or_a_key_are_refused():
    with pytest.raises(ValueError, match="a count is not finite"):
        TileCounts(("a",), np.array([[np.nan]])).dumps()
    with pytest.raises(ValueError, match="2 keys for counts of 1 tiles"):
        TileCounts(("a", "b"), np.ones((1, 3)))


def test_counts_of_another_result_are_noticed(tmp_path):
    path, other = tmp_path / "a" / "results.json", tmp_path / "b" / "results.json"
    COUNTED.write(path)
    dataclasses.replace(COUNTED, counts=TileCounts(KEYS, COUNTS.array + 1)).write(other)
    # As after a kill between the two writes: the old result stays readable, without counts.
    (path.parent / "counts.npz").write_bytes((other.parent / "counts.npz").read_bytes())
    with pytest.raises(EvaluationError, match="is not the file of this result"):
        EvalResult.load(path).load_counts(path)
    (path.parent / "counts.npz").unlink()
    with pytest.raises(EvaluationError, match=r"counts\.npz cannot be read"):
        EvalResult.load(path).load_counts(path)
    dataclasses.replace(COUNTED, num_tiles=5).write(other)
    with pytest.raises(EvaluationError, match=r"has 4 tiles, .* 5"):
        EvalResult.load(other).load_counts(other)


def test_results_of_earlier_revisions_have_no_counts(tmp_path):
    path = tmp_path / "results.json"
    RESULT.write(path)
    content = json.loads(path.read_text())
    content.pop("counts_sha256")
    path.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match="has no counts per tile; evaluate again"):
        EvalResult.load(path).load_counts(path)


def archive(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


NAMES = np.frombuffer(b'["a", "b"]', np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an archive"),
        (archive(keys=NAMES), "is not an archive"),
        (archive(keys=NAMES.astype(np.int32), counts=np.ones(2)), "keys are not bytes"),
        (archive(keys=np.frombuffer(b"{}", np.uint8), counts=np.ones(2)), "expected a list"),
        (archive(keys=np.frombuffer(b"[1, 2]", np.uint8), counts=np.ones(2)), "a key that is not a text"),
        (archive(keys=NAMES, counts=np.ones(3)), "counts of shape .3,. for 2 keys"),
        (archive(keys=NAMES, counts=np.float64(1)), "counts of shape .. for 2 keys"),
        (archive(keys=NAMES, counts=np.array(["1", "2"])), "counts that are not finite numbers"),
        (archive(keys=NAMES, counts=np.array([1, np.inf])), "counts that are not finite numbers"),
        (archive(keys=NAMES, counts=np.ones((2, 40_000_000), np.uint8)), "has more than 64 MiB"),
        (archive(keys=NAMES, counts=np.ones((2, 3, 400_000), np.uint8)), "more than 1048576 counts per tile"),
    ],
)
def test_malformed_counts_are_refused(monkeypatch, content, message):
    monkeypatch.setattr("maestro_scale.untrusted.COUNTS_BYTES", 64 * 2**20)
    with pytest.raises(untrusted.InputError, match=message):
        TileCounts.loads(content)

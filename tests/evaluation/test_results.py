"""results.json: a round trip, and refusal of undefined or unknown values."""

import dataclasses
import json

import numpy as np
import pytest

from maestro_scale.evaluation import results
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

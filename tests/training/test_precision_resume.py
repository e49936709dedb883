"""Which precisions a checkpoint resumes in, among them those of earlier revisions."""

from __future__ import annotations

import json
import shutil

import pytest
from testkit.runs import Trainer, curve, write_recipe

from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.identity import changed_arithmetic, differences, precision_identity

MODES = ("fp32", "bf16", "bf16_weights")


def pretraining(engine: dict) -> dict:
    return {"seed": 3, "engine": engine}


def finetuning(values: dict) -> dict:
    return {"seed": 3, "weights": "sha", **values}


@pytest.mark.parametrize("kind", [pretraining, finetuning])
@pytest.mark.parametrize("stored", MODES)
@pytest.mark.parametrize("now", MODES)
def test_a_checkpoint_resumes_in_its_own_precision_only(kind, stored, now):
    theirs, ours = kind(precision_identity(stored)), kind(precision_identity(now))
    found = differences(theirs, ours)
    assert (found == "") == (stored == now)
    if stored != now:
        assert f"precision: checkpoint {stored!r}, now {now!r}" in found
    assert changed_arithmetic(theirs, ours) == ""


@pytest.mark.parametrize("kind", [pretraining, finetuning])
def test_bf16_of_an_earlier_revision_fits_both_kinds_of_bf16(kind):
    theirs = kind({"precision": "bf16"})
    for now in ("bf16", "bf16_weights"):
        assert differences(theirs, kind(precision_identity(now))) == ""
    assert "precision: checkpoint 'bf16', now 'fp32'" in differences(theirs, kind(precision_identity("fp32")))
    assert differences(theirs, {**kind(precision_identity("bf16")), "seed": 4}) == "seed: checkpoint 3, now 4"
    assert "computed with bf16 weights" in changed_arithmetic(theirs, kind(precision_identity("bf16")))
    assert changed_arithmetic(theirs, kind(precision_identity("bf16_weights"))) == ""


def test_fp32_is_stored_as_by_earlier_revisions():
    assert precision_identity("fp32") == {"precision": "fp32"}


@pytest.mark.slow
def test_a_run_of_an_earlier_revision_in_bf16_continues(synthetic_shards, tmp_path):
    """As it was written: bf16 weights, and an identity that says bf16."""
    trainer = Trainer(write_recipe(tmp_path, synthetic_shards, workers=0))
    weights, autocast = (("--set", f"train.precision={mode}") for mode in ("bf16_weights", "bf16"))
    whole = trainer.train(tmp_path / "whole", 1, *weights)
    resumed = {}
    for name, mode in (("same", weights), ("changed", autocast)):
        run_dir = tmp_path / name
        shutil.copytree(tmp_path / "whole", run_dir, symlinks=True)
        shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
        _write_as_earlier(run_dir / "checkpoints" / "step_00000004")
        code, output = trainer.run(run_dir, 1, *mode)
        assert code == 0, output[-4000:]
        assert ("whose precision bf16 computed with bf16 weights" in output) == (name == "changed")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        resumed[name] = curve(lines)
    assert resumed["same"] == curve(whole)
    assert resumed["changed"] == pytest.approx(curve(whole), rel=2e-2)


def _write_as_earlier(checkpoint) -> None:
    marker = commit.read(checkpoint)
    marker["identity"]["engine"] = {"precision": "bf16"}
    files = marker.pop("files")
    commit.commit(checkpoint, marker, files)

"""FLAIR-HUB and FLAIR#2 from the command line: synthetic tiles, shards, a model trained on two ranks, its scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from testkit.runs import REPO, Trainer, audit
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.shards.format.manifest import Manifest

RECIPE = """
name: tiny-{dataset}
data:
  mixture:
    - dataset: {dataset}
      shards: {shards}
      split: [train, val]
      sensors:
        aerial: {{image_size: 64, patch: 16}}
        dem: {{image_size: 64, patch: 32}}
        s2: {{num_dates: 4}}
{more}
  lanes: 2
  workers: 0
  cache_dir: {cache}
model: {{size: tiny, width: 32, depth: 2, heads: 2, decoder_depth: 1, decoder_width: 32, inter_depth: 1}}
train: {{steps: 2, global_batch: 4, micro_batch: 2, precision: fp32, log_every: 1, audit: true}}
checkpoint: {{every_steps: 2, keep: 1}}
tracking: {{enabled: false, pictures_every: 0}}
"""
MORE = """
        s1_asc: {num_dates: 2}
        s1_des: {num_dates: 2}
        spot: {image_size: 32}
        aerial_rlt: {image_size: 32}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "names", "more", "classes"),
    [
        ("flair_hub", "aerial,dem,s2,s1_asc,s1_des,spot,aerial_rlt,cosia,lpis_1", MORE, 15),
        ("flair2", "", "", 12),
    ],
)
def test_from_synth_to_scores_on_two_ranks(dataset, names, more, classes, tmp_path):
    raw, shards, run = tmp_path / "raw", tmp_path / "shards", CliRunner().invoke
    assert run(app, ["synth", dataset, str(raw), "--tiles", "6", "--seed", "3"]).exit_code == 0
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        options = ["--split", split, "--workers", "1", "--strict", "--shard-mb", "4"]
        options += ["--modalities", names] if names else []
        command = ["shard", dataset, str(raw), str(shards), *options]
        if split == "train":
            first = run(app, [*command, "--part", "2/2"])
            assert first.exit_code == 0, first.output
            assert "part 2/2 of train is written" in first.output
            command += ["--part", "1/2"]
        done = run(app, command)
        assert f"{count} samples in" in done.output, done.output
    checked = run(app, ["verify", str(shards)])
    assert "6 samples, all valid" in checked.output, checked.output
    recipe = tmp_path / "tiny.yaml"
    places = {"shards": json.dumps(str(shards)), "cache": json.dumps(str(tmp_path / "cache"))}
    recipe.write_text(RECIPE.format(dataset=dataset, more=more, **places))

    lines = Trainer(recipe).train(tmp_path / "run", 2)
    assert [m["step"] for m in lines] == [1, 2]
    for sensor in Manifest.load(str(shards)).spec.sensors:
        assert np.isfinite(lines[-1][f"loss/{sensor.name}"]), sensor.name
    assert sum(len(keys) for keys in audit(tmp_path / "run").values()) == 8

    evaluate = Trainer(recipe, entry=REPO / "maestro_scale" / "evaluate.py")
    options = [f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--mode=knn"]
    code, output = evaluate.run(None, 2, *options)
    assert code == 0, output[-4000:]
    result = EvalResult.load(tmp_path / "out" / "knn" / "results.json")
    assert result.metric == "miou"
    assert 0 <= result.value <= 1
    assert len(result.per_class) == classes

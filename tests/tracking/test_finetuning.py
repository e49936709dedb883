"""A finetuning in MLflow: its curve is a run nested in the run of its pretraining, in the same store."""

from __future__ import annotations

import pytest
from testkit.runs import REPO, Trainer, metrics, write_recipe

EVALUATE = REPO / "maestro_scale" / "evaluate.py"
SETTINGS = ["--set", "tracking.enabled=true", "train.micro_batch=8", "data.workers=0"]


@pytest.mark.slow
def test_the_curve_of_a_finetuning_is_nested_in_its_pretraining(synthetic_shards, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe, run_dir, out = (
        write_recipe(tmp_path, synthetic_shards, workers=0),
        tmp_path / "runs" / "run",
        tmp_path / "out",
    )
    Trainer(recipe).train(run_dir, 1, *SETTINGS, "train.steps=2")
    arguments = [
        f"--out={out}",
        f"--checkpoint={run_dir}",
        "--mode=finetune",
        "--split",
        "val=train",
        "test=train",
    ]
    changes = [*SETTINGS, "train.steps=4", "evaluation.validations=2"]
    code, output = Trainer(recipe, entry=EVALUATE).run(None, 1, *arguments, *changes)
    assert code == 0, output[-3000:]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "maestro"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    pretraining, finetuning = runs["tiny"], runs["tiny finetune"]
    assert finetuning.data.tags["mlflow.parentRunId"] == pretraining.info.run_id
    assert finetuning.data.tags["mode"] == "finetune"
    assert finetuning.info.status == "FINISHED"
    lines = metrics(out / "finetune")
    stored = client.get_metric_history(finetuning.info.run_id, "loss/total")
    assert [(m.step, m.value) for m in stored] == [(line["step"], line["loss"]) for line in lines]
    assert len(lines) == 4
    scores = client.get_metric_history(finetuning.info.run_id, "eval/validation")
    assert [m.step for m in scores] == [2, 4]
    assert not (out / "mlflow.db").exists()

"""The final report of a run agrees with metrics.jsonl."""

import json

from testkit.runs import REPO

from maestro_scale.recipe import load_recipe
from maestro_scale.tracking.run_report import run_report


def line(step, dataset, loss, wait_s=0.5):
    speeds = {"samples_per_s": 100.0 + step, "step_s": 2.0, "data_wait_s": wait_s, "tflops": 1.5, "mfu": None}
    return {
        "step": step,
        "samples": 96 * step,
        "dataset": dataset,
        "loss": loss,
        "loss/aerial": loss,
        "explained/aerial": step / 16,
        "skipped_steps": 1,
        "peak_memory_gib": step / 10,
        **speeds,
    }


def test_losses_of_each_dataset_and_speeds(tmp_path):
    recipe = load_recipe(REPO / "recipes" / "vitt.yaml")
    lines = [line(1, "a", 0.9), line(2, "b", 0.8), line(10, "a", None, 0.1), line(11, "b", 0.25)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = run_report(recipe, tmp_path, "done")
    assert text.startswith("# vitt: done after 11 steps\n")
    for words in (
        "1,056 samples, 1 steps skipped",
        "| a | step 1 | step 10 |",
        "| loss | 0.9 | not finite |",
        "| b | step 2 | step 11 |",
        "| aerial | 0.8 | 0.25 |",
        "| explained/aerial | 0.125 | 0.6875 |",
        "| samples/s | 106 |",
        "| of these, waiting for data | 0.5 |",
        "| peak memory, GiB | 1.1 |",
        f"maestro-scale export {tmp_path} MODEL",
    ):
        assert words in text, text
    assert "MFU" not in text
    assert "maestro-scale train --recipe" in run_report(recipe, tmp_path, "stopped")


def test_a_run_without_a_log_line(tmp_path):
    recipe = load_recipe(REPO / "recipes" / "vitt.yaml")
    assert "failed before the first log line" in run_report(recipe, tmp_path, "failed")

"""What of a line of metrics.jsonl becomes which metric."""

from __future__ import annotations

from maestro_scale.tracking.observers import metric_names

LINE = {"step": 3, "dataset": "treesatai_ts#1", "loss": 1.0, "loss/s2": 2.0, "lr": 0.1, "data/retries": 0}


def test_one_dataset_keeps_the_names_of_the_file():
    assert metric_names(LINE, mixture=False) == {"loss": 1.0, "loss/s2": 2.0, "lr": 0.1, "data/retries": 0}


def test_in_a_mixture_every_dataset_has_charts_of_its_own():
    assert metric_names(LINE, mixture=True) == {
        "loss/treesatai_ts.1": 1.0,
        "loss/treesatai_ts.1/s2": 2.0,
        "lr": 0.1,
        "data/retries": 0,
    }

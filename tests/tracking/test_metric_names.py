"""What of a line of metrics.jsonl becomes which metric."""

from __future__ import annotations

from maestro_scale.tracking.metric_names import metric_names

LINE = {
    "step": 3,
    "dataset": "treesatai_ts#1",
    "loss": 1.0,
    "loss/s2": 2.0,
    "explained/s2": 0.25,
    "lr": 0.1,
    "samples_per_s": 7.0,
    "eval/knn": 0.5,
    "eval/delay_s": 3.0,
    "data/retries": 0,
    "time": 1.7e9,
    "new": 5,
}
REST = {
    "optim/lr": 0.1,
    "stream/retries": 0,
    "other/new": 5,
    "speed/samples_per_s": 7.0,
    "eval/knn": 0.5,
    "eval/delay_s": 3.0,
    "brief/samples_per_s": 7.0,
    "brief/score_knn": 0.5,
}


def test_the_first_section_of_charts_has_the_loss():
    names = sorted(metric_names(LINE, mixture=False))
    assert names[0] == "brief/loss"
    assert names[-1].startswith("stream/")


def test_metrics_are_grouped_by_prefix():
    assert metric_names(LINE, mixture=False) == {
        "brief/loss": 1.0,
        "loss/total": 1.0,
        "loss/s2": 2.0,
        "explained/s2": 0.25,
        **REST,
    }


def test_in_a_mixture_every_dataset_has_separate_charts():
    losses = {
        "brief/loss_treesatai_ts.1": 1.0,
        "loss/treesatai_ts.1/total": 1.0,
        "loss/treesatai_ts.1/s2": 2.0,
        "explained/treesatai_ts.1/s2": 0.25,
    }
    assert metric_names(LINE, mixture=True) == {**losses, **REST}


def test_steps_of_tiles_that_lack_sensors_have_curves_of_their_own():
    record = {"step": 3, "dataset": "flair_hub~s1_asc+s1_des", "loss": 1.0, "loss/s2": 0.5, "lr": 0.1}
    prefix = "flair_hub.without.s1_asc.s1_des"
    expected = {f"loss/{prefix}/total": 1.0, f"loss/{prefix}/s2": 0.5, "optim/lr": 0.1}
    expected |= {f"brief/loss_{prefix}": 1.0}
    assert metric_names(record, mixture=False) == expected
    assert metric_names(record | {"dataset": "flair_hub#1~s1_asc+s1_des"}, mixture=True).keys() == {
        f"brief/loss_{prefix.replace('hub', 'hub.1')}",
        f"loss/{prefix.replace('hub', 'hub.1')}/total",
        f"loss/{prefix.replace('hub', 'hub.1')}/s2",
        "optim/lr",
    }

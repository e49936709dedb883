"""The saved views are tags in the format that MLflow's pages write, with the charts that their names promise."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
from testkit.tracked import finished_run

from maestro_scale.tracking.store import connect
from maestro_scale.tracking.sync import sync
from maestro_scale.tracking.views import TAG_PREFIX, build_views, encode, write_views

METRICS = (
    "brief/loss",
    "brief/score_treesatai_ts_knn_wf1",
    "brief/samples_per_s",
    "loss/total",
    "loss/s2",
    "optim/lr",
    "optim/grad_norm",
    "speed/mfu",
    "speed/data_wait_s",
    "system/node7/memory_gib",
    "eval/treesatai_ts/knn/wf1",
    "eval/wf1",
    "eval/wf1_low",
    "stream/retries",
)


def state(value: str) -> dict:
    envelope = json.loads(value)
    assert set(envelope) == {"name", "createdAt", "updatedAt", "state"}
    kind, _, text = envelope["state"].partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(text)))


def charts(view: dict) -> dict[str, list[str]]:
    """Metrics or parameters and metrics of the charts of each open section."""
    shown = {s["uuid"]: s["name"] for s in view["compareRunSections"] if s["display"]}
    found: dict[str, list[str]] = {}
    for chart in view["compareRunCharts"]:
        axes = [chart[axis]["key"] for axis in ("xaxis", "yaxis") if axis in chart]
        found.setdefault(shown[chart["metricSectionId"]], []).append(chart.get("metricKey") or " ".join(axes))
    return found


def test_the_views_have_what_their_names_say():
    views = {view.name: view for view in build_views(METRICS, ["optim.base_lr", "seed", "model.size"])}
    states = {name: state(encode(view, 5)) for name, view in views.items()}
    assert list(states) == ["Runs", "Training", "Speed", "Evaluations", "Compare recipes"]
    training = charts(states["Training"])
    assert next(iter(training)) == "loss"
    assert training["loss"] == ["brief/loss"]
    assert training["loss by sensor"] == ["loss/s2"]
    assert training["learning rate and gradient norm"] == ["optim/lr", "optim/grad_norm"]
    assert [*charts(states["Speed"]).values()] == [
        ["speed/mfu"],
        ["speed/data_wait_s"],
        ["system/node7/memory_gib"],
    ]
    evaluations = charts(states["Evaluations"])
    assert evaluations["by evaluation"] == ["eval/wf1"]
    assert evaluations["by fraction of the labels"] == ["fraction eval/wf1"]
    assert states["Compare recipes"]["selectedColumns"][1:4] == [
        "params.`model.size`",
        "params.`optim.base_lr`",
        "params.`seed`",
    ]
    columns = states["Runs"]["selectedColumns"]
    assert {"metrics.`brief/loss`", "metrics.`brief/score_treesatai_ts_knn_wf1`", "tags.`device`"} < set(
        columns
    )
    link = views["Training"].link("http://h:1", "7")
    assert link.startswith("http://h:1/#/experiments/7/runs?viewStateShareKey=maestro-training&")
    assert link.endswith("workflowType=machine_learning&compareRunsMode=CHART")


def test_a_run_writes_the_views_and_keeps_one_that_a_user_has_saved(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sync(finished_run(tmp_path / "runs" / "run"))
    client = connect(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("maestro")
    views = {k: v for k, v in experiment.tags.items() if k.startswith(TAG_PREFIX)}
    assert len(views) == 5
    assert charts(state(views[f"{TAG_PREFIX}maestro-training"])) == {"loss": ["brief/loss"]}
    name = f"{TAG_PREFIX}maestro-speed"
    changed = json.loads(views[name]) | {"state": "{}"}
    client.set_experiment_tag(experiment.experiment_id, name, json.dumps(changed))
    write_views(client, experiment.experiment_id)
    assert state(client.get_experiment(experiment.experiment_id).tags[name]) == state(views[name])
    changed["updatedAt"] += 1
    client.set_experiment_tag(experiment.experiment_id, name, json.dumps(changed))
    write_views(client, experiment.experiment_id)
    assert json.loads(client.get_experiment(experiment.experiment_id).tags[name]) == changed


def test_the_view_opens_with_the_last_picture_of_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sync(finished_run(tmp_path / "runs" / "run"))
    client = connect(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("maestro").experiment_id

    def slider_step() -> int:
        write_views(client, experiment)
        tag = client.get_experiment(experiment).tags[f"{TAG_PREFIX}maestro-training"]
        (chart,) = (c for c in state(tag)["compareRunCharts"] if c["type"] == "IMAGE")
        return chart["step"]

    (first,) = client.search_runs([experiment])
    image = np.zeros((4, 4, 3), np.uint8)
    # MLflow moves the slider by itself only if there is one step: at step 0 it would show no picture.
    for step in (500, 1000, 60):
        client.log_image(first.info.run_id, image, key="reconstruction", step=step, synchronous=True)
    client.log_image(first.info.run_id, image, key="other", step=2000, synchronous=True)
    assert slider_step() == 1000
    newer = client.create_run(experiment, start_time=first.info.start_time + 10**6)
    client.log_image(newer.info.run_id, image, key="reconstruction", step=70, synchronous=True)
    assert slider_step() == 70

"""Evaluations in MLflow: a run nested in the training run of the checkpoint, and its score on the training's axis."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from maestro_scale.evaluation.charts import class_bars
from maestro_scale.evaluation.report import CLASS_METRIC, pictures, write_report
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.evaluation.series import Found
from maestro_scale.secrets_filter import scrub, scrub_document, scrub_mapping
from maestro_scale.tracking.mlflow_run import tracking_uri
from maestro_scale.tracking.mlflow_tracker import quiet_mlflow
from maestro_scale.tracking.run_file import find_run, run_directory_of

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_CONTENT_TAG = "maestro.results"


def record_evaluation(checkpoint: Path, result: EvalResult, path: Path) -> str | None:
    """Store a result under the run that ``checkpoint`` (a run directory, or within one) belongs to.

    Returns the id of the nested run; None where the run was never tracked, or, with a warning, where the store does not
    take it: ``path``, its results.json, stays the truth.
    """
    run_dir = run_directory_of(checkpoint)
    if run_dir is None:
        return None
    quiet_mlflow()
    try:
        return _record(run_dir, result, path)
    except Exception as error:  # noqa: BLE001 - MLflow raises anything, and the result is on disk
        log.warning(
            "MLflow does not take the evaluation (%s); it is in %s", scrub(str(error).splitlines()[0]), path
        )
        return None


def _record(run_dir: Path, result: EvalResult, path: Path) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri(run_dir))
    parent = find_run(client, run_dir)
    if parent is None:
        raise LookupError(f"it has no run of {run_dir}; `maestro-scale sync {run_dir}` makes one")
    content = _content(path)
    again = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`{_CONTENT_TAG}` = '{content}'",
    )
    if again:  # the same evaluation, given once more
        return again[0].info.run_id
    name = f"{result.benchmark}/{result.mode}" + (
        "" if result.fraction == 1 else f"/{100 * result.fraction:g}pct"
    )
    step, now = result.checkpoint_step or 0, int(time.time() * 1000)
    tags = {"mlflow.parentRunId": parent.info.run_id, "benchmark": result.benchmark, "mode": result.mode}
    tags[_CONTENT_TAG] = content
    nested = client.create_run(parent.info.experiment_id, run_name=f"{name} at step {step}", tags=tags)
    run_id = nested.info.run_id
    scores = {result.metric: result.value, **result.scores}
    classes = {f"class/{_plain(k)}": v for k, v in result.per_class.items() if v is not None}
    low, high = result.interval
    interval = {f"{result.metric}_low": low, f"{result.metric}_high": high}
    if result.deviation is not None:
        interval[f"{result.metric}_deviation"] = result.deviation
    metrics = [
        Metric(f"eval/{_plain(k)}", float(v), now, step) for k, v in {**scores, **interval, **classes}.items()
    ]
    settings = {"benchmark": result.benchmark, "mode": result.mode, "fraction": result.fraction, "step": step}
    settings["seeds"] = ",".join(map(str, result.seeds))
    settings |= {"folds": ",".join(map(str, result.folds))} if result.folds else {}
    settings |= {f"split/{role}": ",".join(names) for role, names in result.splits.items()}
    chosen = {f"chosen/{k}": v for k, v in result.chosen.items()}
    params = [
        Param(k, v) for k, v in scrub_mapping({**settings, "encoder": result.encoder, **chosen}).items()
    ]
    client.log_batch(
        run_id, metrics=metrics, params=params, tags=[RunTag("num_tiles", str(result.num_tiles))]
    )
    client.log_text(run_id, scrub_document(path.read_text()), path.name)
    _illustrate(client, run_id, Found(path, result))
    client.set_terminated(run_id, "FINISHED")
    client.log_batch(
        parent.info.run_id, metrics=[Metric(f"eval/{name}/{result.metric}", result.value, now, step)]
    )
    return run_id


def _illustrate(client: MlflowClient, run_id: str, found: Found) -> None:
    """The report of this result alone, and its pictures each by itself, which MLflow shows beside the metrics."""
    result = found.result
    bars = class_bars({result.mode: result.per_class}, CLASS_METRIC[result.metric])
    with tempfile.TemporaryDirectory() as folder:
        page, _ = write_report([found], Path(folder) / "report.html")
        client.log_text(run_id, scrub(page.read_text()), page.name)
        drawn = Path(folder) / "pictures"
        drawn.mkdir()
        for name, png in {"classes": bars, **pictures(found)}.items():
            (drawn / f"{name}.png").write_bytes(png)
        client.log_artifacts(run_id, str(drawn), drawn.name)


def _content(path: Path) -> str:
    """sha256 of a result but for how long it took."""
    values = json.loads(path.read_text())
    values.pop("timings", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)

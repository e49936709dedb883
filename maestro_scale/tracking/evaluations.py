"""Evaluations in MLflow: a run nested in the training run of the checkpoint, and its score on the training's axis."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from maestro_scale.evaluation.report.charts import class_bars
from maestro_scale.evaluation.report.groups import ResultFile
from maestro_scale.evaluation.report.report import CLASS_METRIC, draw_pictures, write_report
from maestro_scale.evaluation.results import EvalResult, ResultsError
from maestro_scale.secrets_filter import scrub, scrub_document, scrub_mapping
from maestro_scale.tracking.mlflow_run import tracking_uri
from maestro_scale.tracking.mlflow_tracker import configure_mlflow, error_summary
from maestro_scale.tracking.origin import provenance_tags
from maestro_scale.tracking.outbox import PendingEvaluation, add_pending, list_pending, remove_pending
from maestro_scale.tracking.run_file import find_run, find_run_dir, last_store
from maestro_scale.training.run_dir import environment

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_CONTENT_TAG = "maestro.results"


def record_evaluation(checkpoint: Path | None, result: EvalResult, path: Path) -> str | None:
    """Store a result under the run that ``checkpoint`` (a run directory, or within one) belongs to.

    ``checkpoint`` None: of a baseline. Returns the id of the nested run; None, with a warning, where there is no such
    run, or where the store does not take it: ``path``, its results.json, stays the truth, and is noted in the run
    directory for ``maestro-scale sync``.
    """
    run_dir = checkpoint and find_run_dir(checkpoint)
    if run_dir is None:
        what = f"{checkpoint} lies in no run directory" if checkpoint else "a baseline has no training run"
        log.warning("%s is not recorded in MLflow, which nests it in its training run: %s", path, what)
        return None
    configure_mlflow()
    tags = provenance_tags(environment())
    try:
        return _record(run_dir, result, path, tags)
    except Exception as error:  # noqa: BLE001 - MLflow raises anything, and the result is on disk
        later = f"`maestro-scale sync {run_dir}` sends it"
        try:
            add_pending(run_dir, PendingEvaluation(path.resolve(), scrub_mapping(tags)))
        except OSError as unnoted:
            later = f"and stays there alone: sync cannot be told of it in {run_dir} ({unnoted.strerror or unnoted})"
        log.warning(
            "MLflow at %s does not take the evaluation (%s); it is in %s, %s",
            scrub(tracking_uri(run_dir)),
            error_summary(error),
            path,
            later,
        )
        return None


def send_pending(run_dir: Path) -> tuple[int, list[str]]:
    """Send what ``record_evaluation`` could not: (how many, a line on each that cannot be read any more and is given
    up). Raises whatever MLflow raises; what is not sent then stays noted."""
    sent, lost = 0, []
    for waiting in list_pending(run_dir):
        try:
            _record(run_dir, EvalResult.load(waiting.results), waiting.results, waiting.tags)
            sent += 1
        except ResultsError as error:
            lost.append(str(error))
        remove_pending(run_dir, waiting)
    return sent, lost


def _record(run_dir: Path, result: EvalResult, path: Path, origin: Mapping[str, str]) -> str:
    from mlflow.entities import Metric, Param, RunTag

    client, parent = _parent_of(run_dir)
    content = _content(path)
    again = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`{_CONTENT_TAG}` = '{content}'",
    )
    for run in again:
        if run.info.status == "FINISHED":  # the same evaluation, given once more
            return run.info.run_id
        client.delete_run(run.info.run_id)  # it was not sent to its end
    name = f"{result.benchmark}/{result.mode}" + (
        "" if result.fraction == 1 else f"/{100 * result.fraction:g}pct"
    )
    step, now = result.checkpoint_step or 0, int(time.time() * 1000)
    tags = {"mlflow.parentRunId": parent.info.run_id, "benchmark": result.benchmark, "mode": result.mode}
    tags |= {_CONTENT_TAG: content, "dataset": result.benchmark, **scrub_mapping(origin)}
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
    _illustrate(client, run_id, ResultFile(path, result))
    client.log_batch(
        parent.info.run_id, metrics=[Metric(f"eval/{name}/{result.metric}", result.value, now, step)]
    )
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _parent_of(run_dir: Path) -> tuple[MlflowClient, Run]:
    """The store and the run that evaluations of a run directory are nested in. LookupError if there is none."""
    from mlflow.tracking import MlflowClient

    uri, last = tracking_uri(run_dir), last_store(run_dir)
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    # A client would make the file.
    if last is not None and (file is None or file.exists()):
        client = MlflowClient(uri)
        parent = find_run(client, run_dir)
        if parent is not None:
            return client, parent
    elsewhere = f", which was last sent to {last}" if last not in (None, scrub(uri)) else ""
    raise LookupError(f"it has no run of {run_dir}{elsewhere}")


def _illustrate(client: MlflowClient, run_id: str, found: ResultFile) -> None:
    """The report of this result alone, and its pictures each by itself, which MLflow shows beside the metrics."""
    result = found.result
    bars = class_bars({result.mode: result.per_class}, CLASS_METRIC[result.metric])
    with tempfile.TemporaryDirectory() as folder:
        page, _ = write_report([found], Path(folder) / "report.html")
        client.log_text(run_id, scrub(page.read_text()), page.name)
        drawn = Path(folder) / "pictures"
        drawn.mkdir()
        for name, png in {"classes": bars, **draw_pictures(found)}.items():
            (drawn / f"{name}.png").write_bytes(png)
        client.log_artifacts(run_id, str(drawn), drawn.name)


def _content(path: Path) -> str:
    """sha256 of a result but for how long it took."""
    values = json.loads(path.read_text())
    values.pop("timings", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)

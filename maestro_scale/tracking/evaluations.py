"""Evaluations in MLflow: a nested run below the training run, and the score as a metric of the training run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maestro_scale import untrusted
from maestro_scale.escaping import markdown_text, mlflow_key, mlflow_keys, printable, shell_command
from maestro_scale.evaluation.report.charts import class_bars
from maestro_scale.evaluation.report.groups import ResultFile
from maestro_scale.evaluation.report.report import draw_pictures, write_report
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.secrets_filter import scrub, scrub_document, scrub_mapping
from maestro_scale.shards.temporary import temporary_folder
from maestro_scale.tracking.metric_names import brief_score
from maestro_scale.tracking.mlflow_run import NOTE_TAG, artifact_location, tracking_uri
from maestro_scale.tracking.mlflow_tracker import configure_mlflow, error_summary
from maestro_scale.tracking.model_scores import update_versions
from maestro_scale.tracking.origin import provenance_tags
from maestro_scale.tracking.outbox import PendingEvaluation, add_pending, list_pending, remove_pending
from maestro_scale.tracking.run_file import (
    RUN_TAG,
    find_run,
    find_run_dir,
    last_store,
    record_store,
    run_dir_id,
)
from maestro_scale.tracking.store import active_experiment, check_run_experiment, connect, sqlite_path
from maestro_scale.training.run_dir import environment

if TYPE_CHECKING:
    from mlflow.entities import Param, Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_MAX_SECONDS = 1e9
_MAX_NOTE = 5000  # the length of a tag
_CONTENT_TAG = "maestro.results"


def record_evaluation(checkpoint: Path | None, result: EvalResult, path: Path) -> str | None:
    """Store an evaluation as a run nested in the training run of ``checkpoint``; returns the id of the nested run.

    ``checkpoint``: a run directory or a path in one; None for a baseline. ``path``: the results.json of ``result``.
    Never raises: without a training run it logs a warning and returns None; if the store does not accept the
    evaluation it also adds it to the outbox of the run directory, for ``maestro-scale sync``.
    """
    run_dir = checkpoint and find_run_dir(checkpoint)
    if run_dir is None:
        reason = f"{checkpoint} is not in a run directory" if checkpoint else "a baseline has no training run"
        log.warning(
            "%s is not recorded in MLflow: an evaluation is nested in its training run, and %s", path, reason
        )
        return None
    configure_mlflow()
    tags = provenance_tags(environment())
    try:
        return _record(run_dir, result, path, tags)
    except Exception as error:  # noqa: BLE001 - MLflow and its clients raise any type; the result is on disk
        advice = f"`{shell_command('maestro-scale', 'sync', run_dir)}` sends it"
        try:
            add_pending(run_dir, PendingEvaluation(path.resolve(), scrub_mapping(tags)))
        except (OSError, untrusted.InputError) as write_error:
            advice = (
                f"and sync cannot send it: the outbox in {run_dir} is not writable "
                f"({getattr(write_error, 'strerror', None) or write_error})"
            )
        log.warning(
            "MLflow at %s did not accept the evaluation (%s); it is in %s, %s",
            scrub(tracking_uri(run_dir)),
            error_summary(error),
            path,
            advice,
        )
        return None


def record_encoder(
    folder: Path, experiment: str, name: str, results: Sequence[tuple[EvalResult, Path]]
) -> None:
    """Store evaluations of an encoder that has no training run, below a run of its own, which ``folder`` stands for.

    A repeated call finds the runs that exist. Never raises: it logs a warning.
    """
    configure_mlflow()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        client = connect(tracking_uri(folder))
        if find_run(client, folder) is None:
            spans = [_span_ms(result, path) for result, path in results]
            start_ms = min((start for start, _ in spans), default=None)
            run = create_run(client, folder, folder, experiment, name, start_ms)
            end_ms = max((end for _, end in spans), default=None)
            client.set_terminated(run.info.run_id, "FINISHED", end_ms)
    except Exception as error:  # noqa: BLE001 - MLflow and its clients raise any type; the results are on disk
        log.warning("MLflow: the evaluations of %s were not recorded: %s", name, error_summary(error))
        return
    for result, path in results:
        record_evaluation(folder, result, path)


def create_run(
    client: MlflowClient, folder: Path, home: Path, experiment: str, name: str, start_ms: int | None = None
) -> Run:
    """A new MLflow run for ``folder``, in the store of the run directory ``home``. Raises any MLflow error."""
    uri = tracking_uri(home)
    experiment_id = active_experiment(client, experiment, uri, artifact_location(home))
    run = client.create_run(experiment_id, start_ms, {RUN_TAG: run_dir_id(folder)}, run_name=name)
    record_store(folder, run.info.run_id, uri)
    return run


def send_pending(run_dir: Path) -> tuple[int, list[str]]:
    """Send the outbox: (number of evaluations sent, an error message per results.json that cannot be read any more).

    Raises any MLflow error; evaluations that were not sent yet then stay in the outbox.
    """
    num_sent, lost = 0, []
    for pending in list_pending(run_dir):
        try:
            _record(run_dir, EvalResult.load(pending.results), pending.results, pending.tags)
            num_sent += 1
        except EvaluationError as error:
            lost.append(str(error))
        remove_pending(run_dir, pending)
    return num_sent, lost


def _record(run_dir: Path, result: EvalResult, path: Path, provenance: Mapping[str, str]) -> str:
    from mlflow.entities import Metric, RunTag

    client, parent = _find_parent(run_dir)
    content_hash = _content_hash(path)
    if (run_id := _find_recorded(client, parent, content_hash)) is not None:
        return run_id
    name = f"{result.benchmark}/{result.mode}" + (
        "" if result.fraction == 1 else f"/{100 * result.fraction:g}pct"
    )
    step, (start_ms, end_ms) = result.checkpoint_step or 0, _span_ms(result, path)
    tags = {"mlflow.parentRunId": parent.info.run_id, "benchmark": result.benchmark, "mode": result.mode}
    tags |= {_CONTENT_TAG: content_hash, "dataset": result.benchmark, "results": str(path.resolve())}
    tags |= {f"data/{mlflow_key(k)}/manifest_sha256": v for k, v in result.datasets.items()}
    tags = scrub_mapping({**tags, **provenance})
    tags[NOTE_TAG] = scrub(_description(result))[:_MAX_NOTE]
    title = printable(f"{name} at step {step}{_seeds(result)}")
    nested = client.create_run(parent.info.experiment_id, start_ms, tags, run_name=title)
    run_id = nested.info.run_id
    scores = {f"eval/{k}": float(v) for k, v in _metrics(result).items()}
    keys = mlflow_keys(scores)  # of different classes, whatever their names
    metrics = [Metric(keys[k], v, end_ms, step) for k, v in scores.items()]
    num_tiles = RunTag("num_tiles", str(result.num_tiles))
    client.log_batch(run_id, metrics=metrics, params=_params(result, step), tags=[num_tiles])
    client.log_text(run_id, scrub_document(path.read_text()), path.name)
    _log_report(client, run_id, ResultFile(path, result))
    score = f"{name}/{result.metric}"
    on_parent = [mlflow_key(f"eval/{score}"), mlflow_key(brief_score(score))]
    client.log_batch(parent.info.run_id, metrics=[Metric(k, result.value, end_ms, step) for k in on_parent])
    update_versions(client, parent, step)
    # Last: only a complete evaluation is FINISHED, see _find_recorded.
    client.set_terminated(run_id, "FINISHED", end_ms)
    return run_id


def _span_ms(result: EvalResult, path: Path) -> tuple[int, int]:
    """When an evaluation started and ended: it ended by writing ``path``, after the seconds that it states."""
    end_ms = round(1000 * path.stat().st_mtime)
    seconds = sum(s for s in result.timings.values() if 0 <= s < _MAX_SECONDS)
    return max(0, end_ms - round(1000 * seconds)), end_ms


def _seeds(result: EvalResult) -> str:
    """What tells evaluations of one checkpoint apart: seeds other than the default, folds."""
    parts = []
    if result.seeds != (0,):
        parts.append(f"seed {','.join(map(str, result.seeds))}")
    if result.folds:
        parts.append(f"fold {','.join(map(str, result.folds))}")
    return "".join(f", {part}" for part in parts)


def _description(result: EvalResult) -> str:
    """The score in a sentence of Markdown."""
    low, high = result.interval
    step = "" if result.checkpoint_step is None else f" at step {result.checkpoint_step:,}"
    units = f" {result.units}" if result.units else ""
    return markdown_text(
        f"{result.metric} {result.value:.4g}{units} (95 % interval {low:.4g} to {high:.4g}) of {result.encoder}"
        f"{step} on {result.benchmark}: {result.mode} with {100 * result.fraction:g} % of the labels, "
        f"{result.num_tiles:,} tiles."
    )


def _find_recorded(client: MlflowClient, parent: Run, content_hash: str) -> str | None:
    """Id of the complete nested run that holds this result already. Incomplete ones are deleted."""
    found = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`{_CONTENT_TAG}` = '{content_hash}'",
    )
    for run in found:
        if run.info.status == "FINISHED":
            return run.info.run_id
        client.delete_run(run.info.run_id)
    return None


def _metrics(result: EvalResult) -> dict[str, float]:
    """Scores, their intervals and deviation, and the scores per class."""
    low, high = result.interval
    metrics = {result.metric: result.value, **result.scores}
    metrics |= {f"{result.metric}_low": low, f"{result.metric}_high": high}
    if result.deviation is not None:
        metrics[f"{result.metric}_deviation"] = result.deviation
    return metrics | {f"class/{k}": v for k, v in result.per_class.items() if v is not None}


def _params(result: EvalResult, step: int) -> list[Param]:
    from mlflow.entities import Param

    params: dict[str, object] = {
        "benchmark": result.benchmark,
        "mode": result.mode,
        "fraction": result.fraction,
        "step": step,
        "seeds": ",".join(map(str, result.seeds)),
    }
    if result.folds:
        params["folds"] = ",".join(map(str, result.folds))
    params |= {f"split/{role}": ",".join(names) for role, names in result.splits.items()}
    params["encoder"] = result.encoder
    if result.units:
        params["units"] = result.units
    params |= {f"chosen/{k}": v for k, v in result.chosen.items()}
    plain = scrub_mapping(params)
    keys = mlflow_keys(plain)
    return [Param(keys[k], v) for k, v in plain.items()]


def _find_parent(run_dir: Path) -> tuple[MlflowClient, Run]:
    """The store and the training run of a run directory. Raises LookupError if the store does not have
    it, DeletedExperimentError if it is in a deleted experiment."""
    uri, last = tracking_uri(run_dir), last_store(run_dir)
    file = sqlite_path(uri)
    # connect() would create the SQLite file.
    if last is not None and (file is None or file.exists()):
        client = connect(uri)
        parent = find_run(client, run_dir)
        if parent is not None:
            return client, parent
        check_run_experiment(client, run_dir, uri)
    elsewhere = f", which was last sent to {last}" if last not in (None, scrub(uri)) else ""
    raise LookupError(f"the store has no run of {run_dir}{elsewhere}")


def _log_report(client: MlflowClient, run_id: str, result_file: ResultFile) -> None:
    """Store the HTML report of this result, and its pictures as files, which the MLflow UI can show."""
    result = result_file.result
    bars = {}
    if result.per_class:  # a regression has no classes
        bars["classes"] = class_bars({result.mode: result.per_class}, result.kind.of_class)
    with temporary_folder() as folder:
        page, _ = write_report([result_file], folder / "report.html")
        client.log_text(run_id, scrub(page.read_text()), page.name)
        picture_dir = folder / "pictures"
        picture_dir.mkdir()
        for name, png in {**bars, **draw_pictures(result_file)}.items():
            (picture_dir / f"{name}.png").write_bytes(png)
        client.log_artifacts(run_id, str(picture_dir), picture_dir.name)


def _content_hash(path: Path) -> str:
    """sha256 of a results.json without its timings: the same evaluation repeated has the same hash."""
    values = untrusted.read_record(path)
    values.pop("timings", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

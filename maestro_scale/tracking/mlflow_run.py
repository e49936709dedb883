"""Synchronous writes to one MLflow run: metrics, parameters, tags, datasets, artifacts.

Every call here may block on the network and raise; ``mlflow_tracker`` runs them on a background thread. mlflow is
imported inside the functions because the import takes seconds.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock, Timeout

from maestro_scale.escaping import mlflow_key
from maestro_scale.secrets_filter import scrub, scrub_document, scrub_mapping
from maestro_scale.tracking.run_file import (
    RUN_TAG,
    find_run,
    parent_run_dir,
    record_store,
    run_dir_id,
    store_lock,
)
from maestro_scale.tracking.run_times import STATUS, RunEnd
from maestro_scale.tracking.store import ARTIFACTS, active_experiment, connect
from maestro_scale.tracking.views import PICTURE, picture_steps, write_views

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

NOTE_TAG = "mlflow.note.content"  # the description of a run
OWN_NOTE_TAG = "mlflow.maestro.note"  # the description as it was last written here

# MLflow's limits on the size of a request, and on the length of values and names.
_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS = 1000, 100, 100
_MAX_PARAM, _MAX_TAG, _MAX_DIGEST = 6000, 5000, 36

# Artifacts whose text is searched for secrets before it is sent.
_TEXT_SUFFIXES = frozenset({".yaml", ".yml", ".json", ".jsonl", ".txt", ".md", ".log"})

MetricValues = Mapping[str, "float | None"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class DatasetInput:
    """A dataset of a run. ``url``: address of its shards; ``manifest``: the text of its manifest.json."""

    name: str
    manifest_sha256: str
    url: str
    manifest: str = ""


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step, measured at ``time_ms`` (Unix time); None values are not sent."""

    step: int
    time_ms: int
    metrics: MetricValues


@dataclass(frozen=True)
class RunMetadata:
    """What is stored of a run when it is opened.

    ``history`` reads the metrics logged so far, ``description`` the Markdown that MLflow shows above the run;
    ``start_ms``: when the run was first started, None for now.
    """

    run_dir: Path
    experiment: str
    run_name: str
    params: Mapping[str, object]
    tags: Mapping[str, str]
    artifacts: Sequence[Path] = ()
    datasets: Sequence[DatasetInput] = ()
    history: Callable[[], Iterable[StepMetrics]] = field(default=tuple)
    description: Callable[[], str] = field(default=str)
    start_ms: int | None = None


def tracking_uri(run_dir: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or the SQLite file ``mlflow.db`` next to the run directory.

    A finetuning is stored with the pretraining that it starts from.
    """
    home = parent_run_dir(run_dir) or run_dir
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve().parent / 'mlflow.db'}"


class RunLockedError(Exception):
    """Another process is sending this run to this store."""


class MlflowRun:
    """The MLflow run of a run directory. A (metric, step) that the store already has is not sent again."""

    def __init__(
        self,
        client: MlflowClient,
        run: Run,
        metadata: RunMetadata,
        warn: Callable[[str, Exception], None],
        lock: FileLock,
    ) -> None:
        self._client = client
        self._lock = lock
        self.id: str = run.info.run_id
        self._experiment: str = run.info.experiment_id
        self._metadata = metadata
        self._warn = warn
        self._stored: dict[str, set[int]] = {}  # steps per metric that the store had at the last backfill
        self._last: dict[str, int] = {}  # last step per metric sent since then
        self._pictures: set[int] | None = None  # steps that have one; None: not yet read
        self._note = run.data.tags.get(NOTE_TAG, "")
        self._own_note = run.data.tags.get(OWN_NOTE_TAG, "")
        self._store_metadata(run)

    @classmethod
    def open(
        cls,
        metadata: RunMetadata,
        warn: Callable[[str, Exception], None],
        end: RunEnd | None = None,
    ) -> MlflowRun:
        """Create the MLflow run of a run directory, or reopen it, and send the history that the store lacks.

        Args:
            end: of a run that has ended. Its status is then set at once and never to RUNNING: a later call may fail
                and would leave a finished run marked as running.
            warn: called with what could not be stored, if the run is open nevertheless.

        Raises:
            RunLockedError: another process has it open.
            DeletedExperimentError: the experiment was deleted in MLflow. Any other error is MLflow's.
        """
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry
        run_dir = metadata.run_dir
        uri = tracking_uri(run_dir)
        lock = store_lock(run_dir, uri)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunLockedError(f"another process is sending {run_dir} to {scrub(uri)}") from None
        try:
            client = connect(uri)
            run = find_run(client, run_dir)
            if run is None:
                # Before run_dir_id: a store that cannot be reached must leave no tracking.json.
                experiment = active_experiment(client, metadata.experiment, uri, artifact_location(run_dir))
                tags = {RUN_TAG: run_dir_id(run_dir)}
                parent_dir = parent_run_dir(run_dir)
                if parent_dir is not None and (parent := find_run(client, parent_dir)) is not None:
                    tags["mlflow.parentRunId"] = parent.info.run_id
                run = client.create_run(
                    experiment, metadata.start_ms, tags, run_name=scrub(metadata.run_name)
                )
            if end is None:
                client.update_run(run.info.run_id, status="RUNNING")
            else:
                client.set_terminated(run.info.run_id, STATUS[end.reason], end.time_ms)
            record_store(run_dir, run.info.run_id, uri)
            opened = cls(client, run, metadata, warn, lock)
            opened.backfill()
            return opened
        except BaseException:
            lock.release()
            raise

    def backfill(self) -> None:
        """Send the metrics of the history that the store does not have."""
        keys = self._client.get_run(self.id).data.metrics
        self._stored = {k: {m.step for m in self._client.get_metric_history(self.id, k)} for k in keys}
        self._last = {}
        self.send(self._metadata.history())
        # Steps up to the end of the history are complete. The store may have later ones, sent before a kill; they are
        # remembered, because the run trains them again after its resume and logs them a second time.
        self._stored = {k: {s for s in v if s > self._last.get(k, -1)} for k, v in self._stored.items()}

    def send(self, metrics: Iterable[StepMetrics]) -> None:
        """Log metrics, in order of step, without those that the store has."""
        from mlflow.entities import Metric

        pending = []
        for of_step in metrics:
            for name, value in of_step.metrics.items():
                key = mlflow_key(name)
                if value is None or not self._is_new(key, of_step.step):
                    continue
                self._last[key] = of_step.step
                pending.append(Metric(key, float(value), of_step.time_ms, of_step.step))
        for chunk in _chunks(pending, _MAX_METRICS):
            self._client.log_batch(self.id, metrics=chunk)

    def log_picture(self, step: int, path: Path) -> None:
        """Store a picture of a step, for the slider of MLflow's charts, unless the step has one."""
        self._try("a picture", lambda: self._store_picture(step, path))

    def _store_picture(self, step: int, path: Path) -> None:
        from mlflow import Image

        if step in self.stored_pictures():
            return
        time_ms = round(1000 * path.stat().st_mtime)
        self._client.log_image(
            self.id, Image(str(path)), key=PICTURE, step=step, timestamp=time_ms, synchronous=True
        )
        self.stored_pictures().add(step)

    def stored_pictures(self) -> set[int]:
        """Steps that have a picture in the store."""
        if self._pictures is None:
            self._pictures = picture_steps(self._client, self.id)
        return self._pictures

    def close(self, end: RunEnd) -> None:
        """Store the artifacts again in their final state and end the run."""
        self._try("artifacts", self._store_artifacts)  # metrics.jsonl has grown, report.md is new
        self._try("the description", self._store_description)
        self._try("views", self._store_views)
        self._client.set_terminated(self.id, STATUS[end.reason], end.time_ms)
        self.detach()

    def detach(self) -> None:
        """Release the run without changing its status: another process may open it."""
        self._lock.release()

    def _is_new(self, key: str, step: int) -> bool:
        # MLflow stores a second value of the same step beside the first, and charts then show both.
        return step > self._last.get(key, -1) and step not in self._stored.get(key, ())

    def _store_metadata(self, run: Run) -> None:
        """Store parameters, tags, datasets and artifacts. A failure is a warning: metrics are sent nevertheless."""
        self._try("parameters", lambda: self._store_params(run.data.params, run.data.tags))
        self._try("tags", self._store_tags)
        self._try("datasets", self._store_datasets)
        self._try("artifacts", self._store_artifacts)
        self._try("the description", self._store_description)
        # The views are written again when the run ends, with charts of all its metrics.
        self._try("views", self._store_views)

    def _store_views(self) -> None:
        write_views(self._client, self._experiment)

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - MLflow, its artifact stores and their clients raise any type
            self._warn(what, error)

    def _store_params(self, stored: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = {
            mlflow_key(k): _truncate(v, _MAX_PARAM) for k, v in scrub_mapping(self._metadata.params).items()
        }
        new = [Param(k, v) for k, v in params.items() if k not in stored]
        for chunk in _chunks(new, _MAX_PARAMS):
            self._client.log_batch(self.id, params=chunk)
        # MLflow does not allow to change a parameter, but a resumed run may (more steps, more workers): use tags.
        changed = {f"changed/{k}": v for k, v in params.items() if stored.get(k, v) != v}
        self._set_tags(changed)
        for tag in [t for t in tags if t.startswith("changed/") and t not in changed]:
            self._client.delete_tag(self.id, tag)

    def _store_tags(self) -> None:
        data = {f"data/{d.name}/manifest_sha256": d.manifest_sha256 for d in self._metadata.datasets}
        self._set_tags(scrub_mapping(self._metadata.tags) | data)

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(mlflow_key(k), _truncate(v, _MAX_TAG)) for k, v in tags.items()]
        for chunk in _chunks(entities, _MAX_TAGS):
            self._client.log_batch(self.id, tags=chunk)

    def _store_description(self) -> None:
        """Store the description, unless a user has written another one in MLflow."""
        text = _truncate(scrub(self._metadata.description()), _MAX_TAG)
        if not text or text == self._note or self._note not in ("", self._own_note):
            return
        # Tags of MLflow's own prefix are not shown.
        self._set_tags({NOTE_TAG: text, OWN_NOTE_TAG: text})
        self._note = self._own_note = text

    def _store_datasets(self) -> None:
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as Input  # the name DatasetInput is taken

        inputs = [
            Input(
                Dataset(
                    name=d.name,
                    digest=d.manifest_sha256[:_MAX_DIGEST],
                    source_type="shards",
                    source=json.dumps({"url": scrub(d.url)}),
                ),
                [InputTag("mlflow.data.context", "training")],
            )
            for d in self._metadata.datasets
        ]
        if inputs:
            self._client.log_inputs(self.id, datasets=inputs)
        for i, d in enumerate(self._metadata.datasets):
            if d.manifest:
                name = mlflow_key(d.name).replace("/", "_")  # one part of a path
                self._client.log_text(self.id, scrub_document(d.manifest), f"manifests/{i}-{name}.json")

    def _store_artifacts(self) -> None:
        for path in self._metadata.artifacts:
            if not path.exists():
                continue
            if path.suffix in _TEXT_SUFFIXES:
                self._client.log_text(self.id, scrub_document(path.read_text()), path.name)
            else:
                self._client.log_artifact(self.id, str(path))


def artifact_location(run_dir: Path) -> str | None:
    """Of a new experiment. A server has its own; for a file MLflow's default is ./mlruns in the working directory."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    home = parent_run_dir(run_dir) or run_dir
    return (home.resolve().parent / ARTIFACTS).as_uri()


def _truncate(value: str, longest: int) -> str:
    return value if len(value) <= longest else value[: longest - 1] + "…"


def _chunks(items: list[Item], size: int) -> Iterable[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""An open MLflow run. What is here talks to the store, takes its time and may raise; see ``mlflow_tracker``.

mlflow is imported by ``MlflowRun.open`` only: it takes seconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from maestro_scale.secrets_filter import scrub, scrub_document, scrub_mapping
from maestro_scale.tracking.run_file import RUN_TAG, find_run, record_store, run_dir_id, store_lock

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
ENDED_FILE = "ended"  # how the run ended, by the keys of STATUS

# MLflow's own limits.
_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS = 1000, 100, 100
_MAX_PARAM, _MAX_TAG, _MAX_KEY, _MAX_DIGEST = 6000, 5000, 250, 36

_KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # else its pages ask for traces of language models

_DOCUMENTS = frozenset({".yaml", ".yml", ".json", ".jsonl", ".txt", ".md", ".log"})

MetricValues = Mapping[str, "float | None"]


@dataclass(frozen=True)
class DatasetInput:
    """A dataset that a run reads: its name, the sha256 of its manifest, where the shards are, and the manifest."""

    name: str
    manifest_sha256: str
    url: str
    manifest: str = ""


@dataclass(frozen=True)
class RunMetadata:
    """What is said of a run when it starts. ``history`` reads the (step, metrics) that were logged before."""

    run_dir: Path
    experiment: str
    run_name: str
    params: Mapping[str, object]
    tags: Mapping[str, str]
    artifacts: Sequence[Path] = ()
    datasets: Sequence[DatasetInput] = ()
    history: Callable[[], Iterable[tuple[int, MetricValues]]] = field(default=tuple)


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step, measured at ``time_ms``; None values were not measured and are left out."""

    step: int
    time_ms: int
    metrics: MetricValues


def tracking_uri(run_dir: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or the SQLite file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


class RunLockedError(Exception):
    """Another process sends this run to this store."""


class MlflowRun:
    """The MLflow run of a run directory. A (metric, step) that the store has is never sent again."""

    def __init__(
        self,
        client: MlflowClient,
        run: Run,
        card: RunMetadata,
        warn: Callable[[str, Exception], None],
        held: FileLock,
    ) -> None:
        self._client = client
        self._held = held
        self.id: str = run.info.run_id
        self._card = card
        self._warn = warn
        self._stored: dict[str, set[int]] = {}  # what the store had when the run was opened
        self._last: dict[str, int] = {}  # last step sent since
        self._describe(run)

    @classmethod
    def open(
        cls, card: RunMetadata, time_ms: int, warn: Callable[[str, Exception], None], ended: str | None = None
    ) -> MlflowRun:
        """Start the run of the card's directory, or continue it, and send the history that the store lacks.

        ``ended``: ``done``, ``stopped`` or ``failed``, of a run that is over, which never says that it is running:
        what comes after may fail. ``warn`` is told of what could not be sent although the run is open. RunLockedError
        where another process has it open; else raises whatever MLflow raises.
        """
        from mlflow.tracking import MlflowClient

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it announces every retry
        uri = tracking_uri(card.run_dir)
        held = store_lock(card.run_dir, uri)
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise RunLockedError(f"another process sends {card.run_dir} to {scrub(uri)}") from None
        try:
            client = MlflowClient(uri)
            run = find_run(client, card.run_dir)
            if run is None:
                experiment = _experiment_id(client, card)  # first: what cannot be reached leaves no file
                tags = {RUN_TAG: run_dir_id(card.run_dir)}
                run = client.create_run(experiment, run_name=scrub(card.run_name), tags=tags)
            if ended is None:
                client.update_run(run.info.run_id, status="RUNNING")
            else:
                client.set_terminated(run.info.run_id, STATUS[ended])
            record_store(card.run_dir, run.info.run_id, uri)
            opened = cls(client, run, card, warn, held)
            opened.backfill(time_ms)
            return opened
        except BaseException:
            held.release()
            raise

    def backfill(self, time_ms: int) -> None:
        """Send what the history holds and the store does not."""
        keys = self._client.get_run(self.id).data.metrics
        self._stored = {k: {m.step for m in self._client.get_metric_history(self.id, k)} for k in keys}
        self._last = {}
        self.send(StepMetrics(step, time_ms, metrics) for step, metrics in self._card.history())
        # Up to the history's last step all is settled; beyond it the store may have steps yet to be replayed.
        self._stored = {k: {s for s in v if s > self._last.get(k, -1)} for k, v in self._stored.items()}

    def send(self, points: Iterable[StepMetrics]) -> None:
        """Log points, in order of step, leaving out what the store has."""
        from mlflow.entities import Metric

        pending = []
        for point in points:
            for name, value in point.metrics.items():
                key = _key(name)
                if value is None or not self._is_new(key, point.step):
                    continue
                self._last[key] = point.step
                pending.append(Metric(key, float(value), point.time_ms, point.step))
        for chunk in _chunks(pending, _MAX_METRICS):
            self._client.log_batch(self.id, metrics=chunk)

    def log_picture(self, path: Path) -> None:
        """Store a picture under ``pictures/``; one of the same name is replaced."""
        self._optional("a picture", lambda: self._client.log_artifact(self.id, str(path), "pictures"))

    def stored_pictures(self) -> set[str]:
        """Names of the pictures that the store has."""
        return {Path(a.path).name for a in self._client.list_artifacts(self.id, "pictures")}

    def close(self, reason: str) -> None:
        """End the run: ``done``, ``stopped`` or ``failed``. Artifacts are stored again, as they are now."""
        self._optional("artifacts", self._store_artifacts)
        self._client.set_terminated(self.id, STATUS[reason])
        self.detach()

    def detach(self) -> None:
        """Leave the run as it is, for whoever sends to it next."""
        self._held.release()

    def _is_new(self, key: str, step: int) -> bool:
        return step > self._last.get(key, -1) and step not in self._stored.get(key, ())

    def _describe(self, run: Run) -> None:
        """Parameters, tags, datasets, artifacts: worth having, but no reason to go without metrics."""
        self._optional("parameters", lambda: self._store_params(run.data.params, run.data.tags))
        self._optional("tags", self._store_tags)
        self._optional("datasets", self._store_datasets)
        self._optional("artifacts", self._store_artifacts)

    def _optional(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - MLflow, its artifact stores and their clients raise anything
            self._warn(what, error)

    def _store_params(self, stored: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        wanted = {_key(k): _cut(v, _MAX_PARAM) for k, v in scrub_mapping(self._card.params).items()}
        fresh = [Param(k, v) for k, v in wanted.items() if k not in stored]
        for chunk in _chunks(fresh, _MAX_PARAMS):
            self._client.log_batch(self.id, params=chunk)
        # MLflow's parameters never change, a continued run's may (a longer run, more workers).
        changed = {f"changed/{k}": v for k, v in wanted.items() if stored.get(k, v) != v}
        self._set_tags(changed)
        for tag in [t for t in tags if t.startswith("changed/") and t not in changed]:
            self._client.delete_tag(self.id, tag)

    def _store_tags(self) -> None:
        data = {f"data/{d.name}/manifest_sha256": d.manifest_sha256 for d in self._card.datasets}
        self._set_tags(scrub_mapping(self._card.tags) | data)

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(_key(k), _cut(v, _MAX_TAG)) for k, v in tags.items()]
        for chunk in _chunks(entities, _MAX_TAGS):
            self._client.log_batch(self.id, tags=chunk)

    def _store_datasets(self) -> None:
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as Input

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
            for d in self._card.datasets
        ]
        if inputs:
            self._client.log_inputs(self.id, datasets=inputs)
        for i, d in enumerate(self._card.datasets):
            if d.manifest:
                self._client.log_text(
                    self.id, scrub_document(d.manifest), f"manifests/{i}-{_key(d.name)}.json"
                )

    def _store_artifacts(self) -> None:
        for path in self._card.artifacts:
            if not path.exists():
                continue
            if path.suffix in _DOCUMENTS:
                self._client.log_text(self.id, scrub_document(path.read_text()), path.name)
            else:
                self._client.log_artifact(self.id, str(path))


def _experiment_id(client: MlflowClient, card: RunMetadata) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(card.experiment)
    if experiment is None:
        # A server knows where its artifacts go; the default would be ./mlruns in whatever folder we run in.
        beside = (card.run_dir.resolve().parent / "mlartifacts").as_uri()
        location = None if os.environ.get("MLFLOW_TRACKING_URI") else beside
        try:
            return client.create_experiment(card.experiment, artifact_location=location, tags=_KIND)
        except MlflowException:
            experiment = client.get_experiment_by_name(card.experiment)  # another run was quicker
            if experiment is None:
                raise
    return experiment.experiment_id


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_KEY]


def _cut(value: str, longest: int) -> str:
    return value if len(value) <= longest else value[: longest - 1] + "…"


def _chunks(items: list, size: int) -> Iterable[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

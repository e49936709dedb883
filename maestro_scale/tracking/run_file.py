"""The link between a run directory and its MLflow run: an id in ``tracking.json`` that is a tag of the MLflow run.

A run is looked up by this tag and not by MLflow's run id: a store gives the same run whatever address it is reached by,
and a directory can be sent to several stores.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from maestro_scale import untrusted
from maestro_scale.secrets_filter import scrub
from maestro_scale.training.run_dir import write_atomically

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUN_FILE = "tracking.json"
RUN_TAG = "maestro.run_dir"
_PAGE_SIZE = 1000


def find_run_dir(path: Path) -> Path | None:
    """The run directory that is ``path`` or contains it (``path`` may be a checkpoint). None if there is none."""
    return next((p for p in (path, *path.resolve().parents[:2]) if _is_run_dir(p)), None)


def parent_run_dir(run_dir: Path) -> Path | None:
    """The run directory of the pretraining that a finetuning in ``run_dir`` starts from; None for any other run."""
    try:
        checkpoint = untrusted.read_record(run_dir / "environment.json").get("checkpoint")
    except (OSError, ValueError, AttributeError):
        return None
    return find_run_dir(Path(checkpoint)) if isinstance(checkpoint, str) else None


def last_store(run_dir: Path) -> str | None:
    """Address of the store that the run was last sent to; None if it was never sent."""
    return _read(run_dir).get("tracking_uri")


def recorded_run_id(run_dir: Path) -> str | None:
    """Id of the MLflow run that the directory was last sent to; None if it was never sent."""
    run_id = _read(run_dir).get("run_id")
    return run_id if isinstance(run_id, str) else None


def find_run(client: MlflowClient, run_dir: Path) -> Run | None:
    """The MLflow run of a run directory; None if it does not exist or was deleted. Raises any MLflow error."""
    dir_id = _read(run_dir).get("id")
    if not isinstance(dir_id, str):
        return None
    experiments = [e.experiment_id for e in _fetch_all(client.search_experiments)]
    runs = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{dir_id}'") if experiments else []
    return runs[0] if runs else None


def run_dir_id(run_dir: Path) -> str:
    """The id of a run directory; created and saved on first use."""
    dir_id = _read(run_dir).get("id")
    if not isinstance(dir_id, str):
        dir_id = uuid.uuid4().hex
        write_atomically(run_dir / RUN_FILE, json.dumps({"id": dir_id}, indent=1))
    return dir_id


def record_store(run_dir: Path, run_id: str, uri: str) -> None:
    """Record in ``tracking.json`` which MLflow run and store the directory was last sent to."""
    record = {"id": run_dir_id(run_dir), "run_id": run_id, "tracking_uri": scrub(uri)}
    if _read(run_dir) != record:
        write_atomically(run_dir / RUN_FILE, json.dumps(record, indent=1))


def store_lock(run_dir: Path, uri: str) -> FileLock:
    """The lock of the one process that may send a run to a store: two processes would send every metric twice."""
    name = hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:12]
    # It is acquired on the tracker's thread and may be released on another.
    return FileLock(run_dir / f".tracking-{name}.lock", thread_local=False)


def _is_run_dir(path: Path) -> bool:
    return (path / RUN_FILE).exists() or ((path / "recipe.yaml").exists() and (path / "checkpoints").is_dir())


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        record = untrusted.read_record(run_dir / RUN_FILE)
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _fetch_all(search: Any) -> list[Any]:
    """All results of a paged search method of MlflowClient."""
    items: list[Any] = []
    token = None
    while True:
        page = search(max_results=_PAGE_SIZE, page_token=token)
        items += page
        token = page.token
        if not token:
            return items

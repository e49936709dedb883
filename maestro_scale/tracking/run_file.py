"""Which MLflow run is a run directory's: ``tracking.json`` holds an id of its own, which the MLflow run has as a tag.

The store is asked for the tag, so that it is the same run by whatever address the store is reached, in every store that
the directory was sent to.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from maestro_scale.secrets_filter import scrub
from maestro_scale.training.run_dir import write_atomically

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUN_FILE = "tracking.json"
RUN_TAG = "maestro.run_dir"
_PAGE = 1000


def find_run_dir(path: Path) -> Path | None:
    """The run directory that ``path`` is or lies in: one of its checkpoints, say. None where it lies in none."""
    return next((p for p in (path, *path.resolve().parents[:2]) if _is_run(p)), None)


def last_store(run_dir: Path) -> str | None:
    """The address that a run was last sent to; None if it never was."""
    return _read(run_dir).get("tracking_uri")


def find_run(client: MlflowClient, run_dir: Path) -> Run | None:
    """The run of a directory in a store; None if there is none, or it was deleted. Raises whatever MLflow raises."""
    own = _read(run_dir).get("id")
    if not isinstance(own, str):
        return None
    experiments = [e.experiment_id for e in _pages(client.search_experiments)]
    found = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{own}'") if experiments else []
    return found[0] if found else None


def run_dir_id(run_dir: Path) -> str:
    """The directory's id; one is made, and kept, where there is none."""
    own = _read(run_dir).get("id")
    if not isinstance(own, str):
        own = uuid.uuid4().hex
        write_atomically(run_dir / RUN_FILE, json.dumps({"id": own}, indent=1))
    return own


def record_store(run_dir: Path, run_id: str, uri: str) -> None:
    """Say in the file, for people, where the run was last sent."""
    record = {"id": run_dir_id(run_dir), "run_id": run_id, "tracking_uri": scrub(uri)}
    if _read(run_dir) != record:
        write_atomically(run_dir / RUN_FILE, json.dumps(record, indent=1))


def store_lock(run_dir: Path, uri: str) -> FileLock:
    """Held by the one process that sends a run to a store: two would send everything twice."""
    name = hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:12]
    return FileLock(run_dir / f".tracking-{name}.lock", thread_local=False)


def _is_run(path: Path) -> bool:
    return (path / RUN_FILE).exists() or ((path / "recipe.yaml").exists() and (path / "checkpoints").is_dir())


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        record = json.loads((run_dir / RUN_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _pages(search: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = search(max_results=_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found

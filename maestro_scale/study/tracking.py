"""MLflow of a study: a run of the study, below it a run per cell, below that a run per evaluation.

Repeated calls find the runs that exist. Errors of MLflow are logged and never fail a cell: its results are on disk.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from maestro_scale.shards.locks import file_lock
from maestro_scale.study.cells import Cell
from maestro_scale.tracking.evaluations import create_run, record_evaluation
from maestro_scale.tracking.mlflow_run import tracking_uri
from maestro_scale.tracking.mlflow_tracker import configure_mlflow, error_summary
from maestro_scale.tracking.run_file import find_run
from maestro_scale.tracking.store import connect

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_PARENT = "mlflow.parentRunId"
_STUDIES = "studies"  # tag of a cell: the studies that it is part of, separated by commas


def record_cell(cell: Cell, study: str, study_dir: Path) -> None:
    """Put the run of a finished cell below that of the study, with its tags, and its evaluations below it."""
    if not cell.recipe.tracking.enabled:
        return
    try:
        configure_mlflow()
        client = connect(tracking_uri(cell.directory))
        parent = _study_run(client, cell, study, study_dir)
        run = find_run(client, cell.directory)
        if run is None:
            run = _create(client, cell.directory, cell, cell.label)
            client.set_terminated(run.info.run_id, "FINISHED")
        _tag(client, run, cell, study, parent)
    except Exception as error:  # noqa: BLE001 - MLflow and its clients raise any type
        log.warning("MLflow: the cell %s was not recorded: %s", cell.name, error_summary(error))
        return
    for evaluation in cell.evaluations:
        if (result := evaluation.load()) is not None:
            record_evaluation(cell.directory, result, evaluation.results)


def end_study(cells: list[Cell], study_dir: Path, is_complete: bool) -> None:
    """Set the status of the study's run."""
    if not cells or not cells[0].recipe.tracking.enabled or not study_dir.is_dir():
        return
    try:
        configure_mlflow()
        client = connect(tracking_uri(cells[0].directory))
        run = find_run(client, study_dir)
        if run is not None:
            client.set_terminated(run.info.run_id, "FINISHED" if is_complete else "FAILED")
    except Exception as error:  # noqa: BLE001 - as above
        log.warning("MLflow: the state of the study was not recorded: %s", error_summary(error))


def _study_run(client: MlflowClient, cell: Cell, study: str, study_dir: Path) -> Run:
    study_dir.mkdir(parents=True, exist_ok=True)
    # Cells that end at the same time must not create two.
    with file_lock(study_dir / ".mlflow.lock"):
        run = find_run(client, study_dir)
        if run is None:
            run = _create(client, study_dir, cell, study)
            client.set_tag(run.info.run_id, "study", study)
        return run


def _create(client: MlflowClient, folder: Path, cell: Cell, name: str) -> Run:
    return create_run(client, folder, cell.directory, cell.recipe.tracking.experiment, name)


def _tag(client: MlflowClient, run: Run, cell: Cell, study: str, parent: Run) -> None:
    old = run.data.tags
    studies = [name for name in old.get(_STUDIES, "").split(",") if name]
    tags = {
        "seed": str(cell.seed),
        "cell": cell.name,
        "encoder": cell.encoder or "pretrained",
        _STUDIES: ",".join(dict.fromkeys([*studies, study])),
        f"levels/{study}": json.dumps(dict(cell.levels)),
        **{f"{study}/{factor}": level for factor, level in cell.levels.items()},
    }
    # A cell that several studies share stays below the first.
    tags |= {} if _PARENT in old else {_PARENT: parent.info.run_id}
    for key, value in tags.items():
        if old.get(key) != value:
            client.set_tag(run.info.run_id, key, value)

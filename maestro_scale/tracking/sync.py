"""Sends to MLflow what a run's store is missing: after an outage, or from nodes that have no network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from maestro_scale.errors import MaestroError
from maestro_scale.recipe import load_recipe
from maestro_scale.secrets_filter import scrub
from maestro_scale.shards.errors import ShardsError
from maestro_scale.tracking.evaluations import send_pending
from maestro_scale.tracking.mlflow_run import ENDED_FILE, STATUS, MlflowRun, RunLockedError, tracking_uri
from maestro_scale.tracking.mlflow_tracker import configure_mlflow, error_summary
from maestro_scale.tracking.outbox import list_pending
from maestro_scale.tracking.run_params import run_metadata


class SyncError(MaestroError):
    """The store did not take the run; the message says which and why."""


@dataclass(frozen=True)
class SyncResult:
    """Where a run went. ``num_lines``: of metrics.jsonl that were read, ``num_unreadable``: that could not be;
    ``lost``: a line on each evaluation that was to be sent and is gone; ``ended``: whether it is over."""

    run_id: str
    store: str
    num_lines: int
    num_unreadable: int
    num_pictures: int
    num_evaluations: int
    lost_evaluations: tuple[str, ...]
    is_finished: bool


def sync(run_dir: Path) -> SyncResult:
    """Bring the MLflow run of ``run_dir`` up to date with its files; what the store has is not sent again.

    A run that goes on stays open. SyncError if the directory is no run's, the run sends to that store itself, or the
    store does not answer.
    """
    if not (run_dir / "recipe.yaml").exists():
        raise SyncError(f"{run_dir} is no run directory: it has no recipe.yaml")
    configure_mlflow()
    troubles: list[str] = []
    store = scrub(tracking_uri(run_dir))
    try:
        card = run_metadata(load_recipe(run_dir / "recipe.yaml"), run_dir)
        num_lines = sum(1 for _ in card.history())
        num_unreadable = len((run_dir / "metrics.jsonl").read_text().splitlines()) - num_lines
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ShardsError) as error:
        raise SyncError(f"{run_dir} cannot be read as a run directory ({scrub(str(error))})") from error
    ended = None if _is_live(run_dir) else _how_it_ended(run_dir)
    try:
        run = MlflowRun.open(
            card, int(time.time() * 1000), lambda what, error: troubles.append(f"{what}: {error}"), ended
        )
        pictures = sorted((run_dir / "pictures").glob("*.png"))
        missing = [p for p in pictures if p.name not in run.stored_pictures()]
        for path in missing:
            run.log_picture(path)
        if ended is None:
            run.detach()
        else:
            run.close(ended)
        num_evaluations, lost = send_pending(run_dir)
    except RunLockedError as error:
        waiting = len(list_pending(run_dir))
        raise SyncError(
            f"{error}: a run that goes on sends what the store misses by itself, when the store is back or at its end"
            + (f"; sync after it sends the {waiting} evaluations that wait" if waiting else "")
        ) from error
    except Exception as error:
        raise SyncError(f"{store} does not take {run_dir}: {error_summary(error)}") from error
    if troubles:
        raise SyncError(f"{store} did not take {scrub(troubles[0].splitlines()[0])}; the metrics are there")
    return SyncResult(
        run.id,
        store,
        num_lines,
        num_unreadable,
        len(missing),
        num_evaluations,
        tuple(lost),
        ended is not None,
    )


def _how_it_ended(run_dir: Path) -> str:
    """By the keys of STATUS; a run that was killed says nothing."""
    path = run_dir / ENDED_FILE
    said = path.read_text() if path.exists() else ""
    return said if said in STATUS else "stopped"


def _is_live(run_dir: Path) -> bool:
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            return False
    except Timeout:
        return True

"""The ``sync`` command: sends a run directory to MLflow, after an outage or from nodes without network."""

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
    """The run could not be sent to the store; the message says why."""


@dataclass(frozen=True)
class SyncResult:
    """What ``sync`` sent.

    ``num_lines``, ``num_unreadable``: lines of metrics.jsonl that could and could not be read; ``lost_evaluations``: a
    message for each evaluation of the outbox whose results.json cannot be read; ``is_finished``: the run has ended.
    """

    run_id: str
    store: str
    num_lines: int
    num_unreadable: int
    num_pictures: int
    num_evaluations: int
    lost_evaluations: tuple[str, ...]
    is_finished: bool


def sync(run_dir: Path) -> SyncResult:
    """Bring the MLflow run of ``run_dir`` up to date with its files; only what the store lacks is sent.

    The MLflow run of a training that is still running stays open. Raises SyncError if ``run_dir`` is not a run
    directory, if another process is sending it to this store, or if the store cannot be reached.
    """
    if not (run_dir / "recipe.yaml").exists():
        raise SyncError(f"{run_dir} is not a run directory: it has no recipe.yaml")
    configure_mlflow()
    failures: list[str] = []
    store = scrub(tracking_uri(run_dir))
    try:
        metadata = run_metadata(load_recipe(run_dir / "recipe.yaml"), run_dir)
        num_lines = sum(1 for _ in metadata.history())
        # A kill can leave an incomplete last line, which history() skips.
        num_unreadable = len((run_dir / "metrics.jsonl").read_text().splitlines()) - num_lines
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ShardsError) as error:
        raise SyncError(f"{run_dir} cannot be read as a run directory ({scrub(str(error))})") from error
    end_reason = None if _is_running(run_dir) else _end_reason(run_dir)
    try:
        run = MlflowRun.open(
            metadata,
            int(time.time() * 1000),
            lambda what, error: failures.append(f"{what}: {error}"),
            end_reason,
        )
        pictures = sorted((run_dir / "pictures").glob("*.png"))
        missing = [p for p in pictures if p.name not in run.stored_pictures()]
        for path in missing:
            run.log_picture(path)
        if end_reason is None:
            run.detach()
        else:
            run.close(end_reason)
        # After the run is open: evaluations are nested in it.
        num_evaluations, lost = send_pending(run_dir)
    except RunLockedError as error:
        num_pending = len(list_pending(run_dir))
        raise SyncError(
            f"{error}: a running training sends what the store is missing once the store is back, or when it ends"
            + (f"; run sync after that to send {num_pending} pending evaluations" if num_pending else "")
        ) from error
    except Exception as error:
        raise SyncError(f"{store} did not accept {run_dir}: {error_summary(error)}") from error
    if failures:
        raise SyncError(
            f"{store} did not accept {scrub(failures[0].splitlines()[0])}; the metrics are stored"
        )
    return SyncResult(
        run.id,
        store,
        num_lines,
        num_unreadable,
        len(missing),
        num_evaluations,
        tuple(lost),
        end_reason is not None,
    )


def _end_reason(run_dir: Path) -> str:
    """How the run ended, a key of STATUS. A run that was killed left no record: ``stopped``."""
    path = run_dir / ENDED_FILE
    reason = path.read_text() if path.exists() else ""
    return reason if reason in STATUS else "stopped"


def _is_running(run_dir: Path) -> bool:
    """Whether a training holds the lock of the run directory."""
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            return False
    except Timeout:
        return True

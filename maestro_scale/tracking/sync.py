"""The ``sync`` command: sends a run directory to MLflow, after an outage or from nodes without network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from maestro_scale.errors import MaestroError
from maestro_scale.recipe import load_recipe
from maestro_scale.secrets_filter import scrub
from maestro_scale.shards.errors import ShardsError
from maestro_scale.tracking.evaluations import send_pending
from maestro_scale.tracking.mlflow_run import MlflowRun, RunLockedError, tracking_uri
from maestro_scale.tracking.mlflow_tracker import configure_mlflow, error_summary
from maestro_scale.tracking.outbox import list_pending
from maestro_scale.tracking.pictures import picture_step
from maestro_scale.tracking.run_params import run_metadata
from maestro_scale.tracking.run_times import read_end
from maestro_scale.training.run_dir import LOCK, JsonLines, RunDirError, check_files


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
    directory, or has other things than files in it, if another process is sending it to this store, or if the store
    cannot be reached.
    """
    if not (run_dir / "recipe.yaml").exists():
        raise SyncError(f"{run_dir} is not a run directory: it has no recipe.yaml")
    try:
        check_files(run_dir)
    except RunDirError as error:
        raise SyncError(str(error)) from error
    configure_mlflow()
    failures: list[str] = []
    store = scrub(tracking_uri(run_dir))
    try:
        metadata = run_metadata(load_recipe(run_dir / "recipe.yaml"), run_dir)
        lines = JsonLines(run_dir / "metrics.jsonl").read()
        num_lines = len(lines)
        # A kill can leave an incomplete last line, which history() skips.
        num_unreadable = len((run_dir / "metrics.jsonl").read_text().splitlines()) - num_lines
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ShardsError) as error:
        raise SyncError(f"{run_dir} cannot be read as a run directory ({scrub(str(error))})") from error
    end = None if _is_running(run_dir) else read_end(run_dir, lines)
    try:
        run = MlflowRun.open(
            metadata,
            lambda what, error: failures.append(f"{what}: {error}"),
            end,
        )
        pictures = {picture_step(p): p for p in sorted((run_dir / "pictures").glob("step_*.png"))}
        missing = sorted(pictures.keys() - run.stored_pictures())
        for step in missing:
            run.log_picture(step, pictures[step])
        if end is None:
            run.detach()
        else:
            run.close(end)
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
        end is not None,
    )


def _is_running(run_dir: Path) -> bool:
    """Whether a training holds the lock of the run directory."""
    try:
        with FileLock(run_dir / LOCK, timeout=0):
            return False
    except Timeout:
        return True

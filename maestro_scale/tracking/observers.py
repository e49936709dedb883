"""The observers of a training run on rank 0: terminal progress, reconstruction pictures, MLflow, final report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from maestro_scale.recipe import Recipe
from maestro_scale.secrets_filter import scrub, scrub_mapping
from maestro_scale.tracking.metric_names import metric_names
from maestro_scale.tracking.mlflow_run import MetricValues
from maestro_scale.tracking.mlflow_tracker import MlflowTracker
from maestro_scale.tracking.pictures import picture_path, reconstruction_picture
from maestro_scale.tracking.run_params import run_metadata
from maestro_scale.tracking.run_report import REPORT, run_report
from maestro_scale.tracking.run_times import ENDED_FILE, RunEnd, write_end
from maestro_scale.tracking.tensorboard_tracker import TensorBoardTracker, check_installed
from maestro_scale.tracking.terminal import TerminalProgress
from maestro_scale.tracking.tracker import GuardedTracker, RunStart, Tracker, find_plugins
from maestro_scale.training.observer import Observer, RunInfo, SensorView
from maestro_scale.training.run_dir import write_atomically

log = logging.getLogger(__name__)

_MAX_PENDING_PICTURES = 4


def observers_for(recipe: Recipe) -> list[Observer]:
    """The observers of a recipe, in the order in which they are called."""
    return [TerminalProgress(recipe.name), TrackingObserver(recipe)]


class TrackingObserver:
    """Draws pictures into ``run_dir/pictures``, writes ``report.md``, and logs to the trackers of the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        # Before time is spent on a run that would not be tracked as asked.
        if recipe.tracking.tensorboard:
            check_installed()
        self._plugins = find_plugins(recipe.tracking.plugins)
        self._trackers: list[Tracker] = []
        self._run_dir = Path()
        # A picture takes about a second, which must not delay the step.
        self._executor = ThreadPoolExecutor(1, "pictures")
        self._pending: list[Future[None]] = []

    def started(self, info: RunInfo) -> None:
        """Start tracking; the MLflow run of the run directory is created or continued."""
        self._run_dir = info.run_dir
        # Of an earlier start: if this one is killed, sync must not find a reason that is no longer true.
        (self._run_dir / ENDED_FILE).unlink(missing_ok=True)
        tracking = self._recipe.tracking
        if not (tracking.enabled or tracking.tensorboard or self._plugins):
            return
        run = run_metadata(self._recipe, info.run_dir)
        if tracking.enabled:
            self._trackers.append(MlflowTracker.start(run))
        params, tags = scrub_mapping(run.params), scrub_mapping(run.tags)
        start = RunStart(info.run_dir, scrub(run.run_name), info.step, params, tags)
        others: dict[str, Callable[[RunStart], Tracker]] = dict(self._plugins)
        if tracking.tensorboard:
            others["TensorBoard"] = TensorBoardTracker
        self._trackers += [GuardedTracker(name, partial(make, start)) for name, make in others.items()]

    def logged(self, record: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        metrics = self._metrics(record) if self._trackers else {}
        for tracker in self._trackers:
            tracker.log(record["step"], metrics, record.get("time"))

    def pictured(self, step: int, views: list[SensorView]) -> None:
        """Draw a reconstruction in the background; it is dropped if too many are pending."""
        self._pending = [p for p in self._pending if not p.done()]
        if len(self._pending) < _MAX_PENDING_PICTURES:
            self._pending.append(self._executor.submit(self._draw, step, views))

    def finished(self, reason: str) -> None:
        """Write ``report.md`` and how the run ended, then finish tracking."""
        self._executor.shutdown()  # waits, so that all pictures are logged before the tracker finishes
        try:
            text = run_report(self._recipe, self._run_dir, reason)
            write_atomically(self._run_dir / REPORT, scrub(text))
            write_end(self._run_dir, RunEnd(reason, round(1000 * time.time())))
        except OSError as error:  # e.g. a full disk; it must not hide the error that ended the run
            log.warning("%s was not written: %s", REPORT, error)
        for tracker in self._trackers:
            tracker.finish(reason)

    def _draw(self, step: int, views: list[SensorView]) -> None:
        path = picture_path(self._run_dir, step)
        try:
            reconstruction_picture(path, views, f"{self._recipe.name}, step {step}")
        except Exception as error:  # noqa: BLE001 - a picture that fails, for whatever reason, must not end the run
            log.warning("the picture of step %d was not drawn: %s", step, error)
        else:
            for tracker in self._trackers:
                tracker.log_picture(step, path)

    def _metrics(self, record: dict[str, Any]) -> MetricValues:
        return metric_names(record, mixture=len(self._recipe.data.mixture) > 1)

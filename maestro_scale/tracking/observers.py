"""Who watches a pretraining run on rank 0: the terminal, the pictures on disk, and MLflow."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maestro_scale.recipe import Recipe
from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.metric_names import metric_names
from maestro_scale.tracking.mlflow_run import ENDED_FILE, MetricValues
from maestro_scale.tracking.mlflow_tracker import NullTracker, Tracker
from maestro_scale.tracking.pictures import reconstruction_picture
from maestro_scale.tracking.run_params import run_metadata
from maestro_scale.tracking.run_report import REPORT, run_report
from maestro_scale.tracking.terminal import TerminalProgress
from maestro_scale.training.observer import Observer, RunInfo, SensorView
from maestro_scale.training.run_dir import write_atomically

log = logging.getLogger(__name__)

_MOST_WAITING = 4  # pictures


def observers_for(recipe: Recipe) -> list[Observer]:
    """The observers that a recipe asks for, in the order they are told."""
    return [TerminalProgress(recipe.name), TrackingObserver(recipe)]


class TrackingObserver:
    """Draws pictures into ``run_dir/pictures`` and passes everything on to MLflow, where the recipe enables it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tracker: Tracker | NullTracker = NullTracker()
        self._run_dir = self._pictures = self._ended = Path()
        self._artist = ThreadPoolExecutor(1, "pictures")  # a picture takes about a second
        self._drawing: list[Future[None]] = []

    def started(self, info: RunInfo) -> None:
        """Open, or continue, the MLflow run of the run directory."""
        self._run_dir = info.run_dir
        self._pictures = info.run_dir / "pictures"
        self._ended = info.run_dir / ENDED_FILE
        self._ended.unlink(missing_ok=True)
        if not self._recipe.tracking.enabled:
            return
        self._tracker = Tracker.start(run_metadata(self._recipe, info.run_dir))

    def logged(self, record: dict[str, Any]) -> None:
        """Metrics of a step."""
        self._tracker.log(record["step"], self._numbers(record))

    def pictured(self, step: int, views: list[SensorView]) -> None:
        """Draw a reconstruction, in the background; leave it out where too many wait to be drawn."""
        self._drawing = [d for d in self._drawing if not d.done()]
        if len(self._drawing) < _MOST_WAITING:
            self._drawing.append(self._artist.submit(self._draw, step, views))

    def finished(self, reason: str) -> None:
        """Leave the closing report, and send what is left."""
        self._artist.shutdown()
        try:
            text = run_report(self._recipe, self._run_dir, reason)
            write_atomically(self._run_dir / REPORT, scrub(text))
            write_atomically(self._ended, reason)
        except OSError as error:  # a full disk, say; what ended the run is told by others
            log.warning("no %s: %s", REPORT, error)
        self._tracker.finish(reason)

    def _draw(self, step: int, views: list[SensorView]) -> None:
        path = self._pictures / f"step_{step:08d}.png"
        try:
            reconstruction_picture(path, views, f"{self._recipe.name}, step {step}")
        except Exception as error:  # noqa: BLE001 - a full disk, or whatever else, must not end a run for want of a picture
            log.warning("no picture of step %d: %s", step, error)
        else:
            self._tracker.log_picture(step, path)

    def _numbers(self, record: dict[str, Any]) -> MetricValues:
        return metric_names(record, mixture=len(self._recipe.data.mixture) > 1)

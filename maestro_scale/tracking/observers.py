"""Who watches a pretraining run on rank 0: the terminal, the pictures on disk, and MLflow."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maestro_scale.recipe import Recipe
from maestro_scale.shards.manifest import Manifest
from maestro_scale.tracking.mlflow_run import DatasetInput, Numbers
from maestro_scale.tracking.mlflow_tracker import NullTracker, Tracker
from maestro_scale.tracking.pictures import reconstruction_picture
from maestro_scale.tracking.terminal import TerminalProgress
from maestro_scale.training.observer import Observer, RunInfo, SensorView
from maestro_scale.training.run_dir import JsonLines

log = logging.getLogger(__name__)

_NO_METRICS = frozenset({"step", "dataset"})  # MLflow's axis, and what the losses' names say


def observers_for(recipe: Recipe) -> list[Observer]:
    """The observers that a recipe asks for, in the order they are told."""
    return [TerminalProgress(recipe.name), TrackingObserver(recipe)]


class TrackingObserver:
    """Draws pictures into ``run_dir/pictures`` and passes everything on to MLflow, where the recipe enables it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tracker: Tracker | NullTracker = NullTracker()
        self._pictures = Path()

    def started(self, info: RunInfo) -> None:
        """Open, or continue, the MLflow run of the run directory."""
        self._pictures = info.run_dir / "pictures"
        if not self._recipe.tracking.enabled:
            return
        metrics = JsonLines(info.run_dir / "metrics.jsonl")

        def history() -> Iterable[tuple[int, Numbers]]:
            return ((line["step"], self._numbers(line)) for line in metrics.read())

        self._tracker = Tracker.start(
            info.run_dir,
            self._recipe.tracking.experiment,
            self._recipe.name,
            self._recipe.flat(),
            _tags(self._recipe, info.run_dir),
            [info.run_dir / "recipe.yaml", info.run_dir / "environment.json"],
            [
                DatasetInput(e.dataset, Manifest.load(e.shards).digest, e.shards)
                for e in self._recipe.data.mixture
            ],
            history,
        )

    def logged(self, record: dict[str, Any]) -> None:
        """Metrics of a step."""
        self._tracker.log(record["step"], self._numbers(record))

    def pictured(self, step: int, views: list[SensorView]) -> None:
        """Draw a reconstruction."""
        path = self._pictures / f"step_{step:08d}.png"
        try:
            reconstruction_picture(path, views, f"{self._recipe.name}, step {step}")
        except (OSError, ValueError) as error:  # a full disk must not end a run for want of a picture
            log.warning("no picture of step %d: %s", step, error)
        else:
            self._tracker.picture(step, path)

    def finished(self, reason: str) -> None:
        """Send what is left."""
        self._tracker.finish(reason)

    def _numbers(self, record: dict[str, Any]) -> Numbers:
        return metric_names(record, mixture=len(self._recipe.data.mixture) > 1)


def metric_names(record: dict[str, Any], mixture: bool) -> Numbers:
    """The numbers of a line of metrics.jsonl under MLflow's names: in a mixture, ``loss/<dataset>/<sensor>`` and
    ``loss/<dataset>``, so that no chart jumps between datasets."""
    numbers = {k: v for k, v in record.items() if k not in _NO_METRICS}
    if not mixture:
        return numbers
    loss = f"loss/{record['dataset'].replace('#', '.')}"  # MLflow allows no '#'
    return {re.sub(r"^loss(?=/|$)", loss, name): value for name, value in numbers.items()}


def _tags(recipe: Recipe, run_dir: Path) -> dict[str, str]:
    environment = json.loads((run_dir / "environment.json").read_text())
    tags = {
        "dataset": ",".join(e.dataset for e in recipe.data.mixture),
        "size": recipe.model.size,
        "fusion": recipe.model.fusion,
        "target": recipe.model.target,
        "git_revision": environment["git_revision"],
        "host": environment["host"],
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    return {k: v for k, v in tags.items() if v}

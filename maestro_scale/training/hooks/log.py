"""Logs steps: a line of metrics.jsonl, and the observers (terminal, MLflow)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maestro_scale.recipe.sections import Train
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.distributed import World
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.metrics.meter import Meter
from maestro_scale.training.metrics.metrics_file import MetricsFile
from maestro_scale.training.metrics.nodes import Nodes
from maestro_scale.training.objectives import Objective
from maestro_scale.training.observer import Observer, RunInfo
from maestro_scale.training.run_dir import finite


class LogHook(Hook):
    """After the hooks that measure something of a step, which goes into its line.

    A line is due every ``log_every`` steps *of a dataset*: in a mixture the steps of one dataset might never fall on a
    multiple of the run's steps.
    """

    def __init__(
        self,
        run_dir: Path,
        train: Train,
        world: World,
        objective: Objective,
        metrics: MetricsFile,
        observers: Sequence[Observer],
    ) -> None:
        self._run_dir, self._log_every, self._global_batch = run_dir, train.log_every, train.global_batch
        self._world, self._objective = world, objective
        self._metrics, self._observers = metrics, observers
        self._meter, self._nodes = Meter(world), Nodes(world)

    def on_start(self, position: Position, num_steps: int) -> None:
        """Start to measure."""
        info = RunInfo(self._run_dir, position.step, num_steps, self._global_batch)
        for observer in self._observers:
            observer.started(info)
        self._meter.restart()

    def after_step(self, step: FinishedStep) -> bool:
        """Count the step; log it where it is due."""
        dataset = step.data.dataset
        self._meter.add(self._global_batch, self._objective.cost(dataset), step.wait_s)
        turn = step.data.dataset_step
        if step.is_last or turn == 1 or turn % self._log_every == 0 or step.metrics:
            self._log(step)
        return False

    def on_end(self, reason: str) -> None:
        """Let the observers finish."""
        for observer in self._observers:
            observer.finished(reason)

    def _log(self, step: FinishedStep) -> None:
        self._meter.exclude(step.metrics.get("eval/delay_s") or 0.0)
        # Every rank takes part: the meter, the node statistics and the counters are collective. Only rank 0 writes.
        speeds, nodes, counters = self._meter.read(), self._nodes.read(), step.data.counters
        totals = dict(zip(counters, self._world.sums(list(counters.values())), strict=True))
        if not self._world.is_main:
            return
        result, dataset = step.result, step.data.dataset
        record: dict[str, Any] = {
            "step": step.position.step,
            "time": round(time.time(), 3),
            "epoch": step.data.epoch,
            "samples": step.position.samples,
            "dataset": dataset,
            "loss": finite(result.loss),
            **self._objective.loss_metrics(dataset, result.sums, step.num_terms),
            "lr": result.lr,
            "grad_norm": finite(result.norm),
            **speeds,
            "skipped_steps": step.position.skipped_steps,
            **step.metrics,
            **{f"data/{name}": total for name, total in totals.items()},
            **nodes,
        }
        if (written := self._metrics.append_step(record)) is None:
            return
        for observer in self._observers:
            observer.logged(written)

"""Validates a finetuning as it trains: scores the averaged weights, keeps the best ones, and stops early."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maestro_scale import untrusted
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.features.on_device import RecipePrecision
from maestro_scale.evaluation.finetune import early_stop
from maestro_scale.evaluation.finetune.early_stop import ValidationScore
from maestro_scale.evaluation.finetune.predictions import predict_split
from maestro_scale.evaluation.finetune.predictor import Predictor
from maestro_scale.evaluation.metric_kinds import METRIC_KINDS
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.interop.tensors import write_tensors_atomically
from maestro_scale.shards.errors import one_line
from maestro_scale.stream.source import Source
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.distributed import World
from maestro_scale.training.ema import WeightEMA
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.run_dir import JsonLines


@dataclass(frozen=True)
class ValidationSettings:
    """``validations``: how many, evenly spread; ``patience``: without a better score before the end, 0: no limit.
    ``precision``: as in ``eval_precision``."""

    validations: int
    patience: int
    workers: int
    precision: RecipePrecision


class ValidationHook(Hook):
    """The history of scores, ``validation.jsonl`` and ``best/step_*.safetensors`` of a finetuning.

    ``network``: outside of DeepSpeed; holds the average whenever it is scored. Not the trained one, because ranks
    have different numbers of validation batches and a forward pass under ZeRO 3 is collective.
    """

    name = "validation"

    def __init__(
        self,
        network: Predictor,
        ema: WeightEMA,
        source: Source,
        world: World,
        run_dir: Path,
        settings: ValidationSettings,
        on_batch: Callable[[int], None],
    ) -> None:
        self._network, self._ema, self._source, self._world = network, ema, source, world
        self._run_dir, self._settings, self._on_batch = run_dir, settings, on_batch
        self._lines = JsonLines(run_dir / "validation.jsonl")
        self._num_steps = 0
        self.history: list[ValidationScore] = []
        self._sign = METRIC_KINDS[network.target_loss.task.metric].sign

    @property
    def best(self) -> ValidationScore:
        """The best score so far."""
        return early_stop.best(self.history, self._sign)

    @property
    def best_weights(self) -> Path:
        """The file of the best weights so far."""
        return self._best_path(self.best.step)

    @property
    def finished(self) -> bool:
        """Whether the scores have stopped improving."""
        return early_stop.exhausted(self.history, self._settings.patience, self._sign)

    def load_best(self) -> Predictor:
        """The network with the best weights. EvaluationError unless they are those that were validated."""
        path, problem = self._best_path(self.best.step), ""
        try:
            self._network.load_state_dict(untrusted.load_tensors(path))
        except (untrusted.InputError, RuntimeError, OSError) as error:
            problem = f"cannot be loaded ({one_line(error)})"
        if not problem and self.best.weights not in ("", weights_digest(self._network)):
            problem = "are not the weights that were validated"
        if problem:
            raise EvaluationError(f"{path}: {problem}; remove {self._run_dir} and finetune again")
        return self._network

    def on_start(self, position: Position, num_steps: int) -> None:
        """Drop lines of steps that will be repeated."""
        self._num_steps = num_steps
        if self._world.is_main:
            self._lines.rewind(position.step)

    def after_step(self, step: FinishedStep) -> bool:
        """Validate at the scheduled steps; a checkpoint follows, so that no validation is repeated after a kill."""
        number = step.position.step
        if not early_stop.due(number, self._num_steps, self._settings.validations):
            return False
        started = time.perf_counter()
        self._on_batch(number)  # also on a rank without a batch, see evaluation/in_loop.py
        self._ema.gather_into(self._network, self._world)
        predictions = predict_split(
            self._network,
            self._source,
            self._world,
            self._settings.workers,
            self._settings.precision,
            on_batch=lambda: self._on_batch(number),
        )
        task = self._network.target_loss.task
        score = float(task.statistic(task.total(predictions.counts)))
        best_index([score])
        self.history.append(ValidationScore(number, score))
        if self.best.step == number:
            self.history[-1] = ValidationScore(number, score, weights_digest(self._network))
        if self._world.is_main:
            if self.best.step == number:
                write_tensors_atomically(self._network.state_dict(), self._best_path(number))
            self._lines.append({"step": number, "score": score})
        step.metrics.update({"eval/validation": score, "eval/delay_s": time.perf_counter() - started})
        return True

    def after_commit(self, position: Position) -> None:
        """Remove weights that neither this run nor one that resumes from the checkpoint can need."""
        if not self._world.is_main:
            return
        stored = [score for score in self.history if score.step <= position.step]
        kept = {
            self._best_path(early_stop.best(scores, self._sign).step)
            for scores in (stored, self.history)
            if scores
        }
        averages = self._run_dir.glob("average/step_*")  # of an earlier revision; checkpoints hold them now
        for path in {*averages, *self._run_dir.glob("best/step_*")} - kept:
            path.unlink()

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": [asdict(score) for score in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The history of a checkpoint. EvaluationError where it continues after the end that the patience gives: its
        best score may be one that a run with this patience never reaches."""
        self.history = [ValidationScore(**score) for score in state["history"]]
        patience = self._settings.patience
        ends = (
            n
            for n in range(len(self.history))
            if early_stop.exhausted(self.history[:n], patience, self._sign)
        )
        if (end := next(ends, None)) is not None:
            raise EvaluationError(
                f"{self._run_dir}: evaluation.patience={patience} ends this run at step {self.history[end - 1].step}, "
                f"and it was trained to step {self.history[-1].step} with a larger one; finetune into another directory"
            )

    def _best_path(self, step: int) -> Path:
        return self._run_dir / "best" / f"step_{step:08d}.safetensors"

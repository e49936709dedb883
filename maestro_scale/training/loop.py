"""The training loop: everything that happens in a step, in the order it happens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import Cost
from maestro_scale.model.masking import Mask, MaskingConfig, draw_masks, masks_by_sensor
from maestro_scale.model.targets import num_masked_values
from maestro_scale.stream.batch import Batch, digest
from maestro_scale.stream.loader import Step, TrainLoader
from maestro_scale.training.checkpoint.checkpoints import Checkpoints, Position
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import Engine, StepResult
from maestro_scale.training.garbage import collected_every
from maestro_scale.training.metrics.meter import Meter
from maestro_scale.training.metrics.metrics_file import MetricsFile
from maestro_scale.training.metrics.nodes import Nodes
from maestro_scale.training.observer import Observer, SensorView
from maestro_scale.training.run_dir import JsonLines, finite
from maestro_scale.training.skipped import SkippedSteps
from maestro_scale.training.snapshot import snapshot
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import Watchdog


@dataclass(frozen=True)
class Rhythm:
    """When things happen, in steps (``checkpoint_s``: in seconds); 0 means never."""

    num_steps: int
    global_batch: int
    log_every: int
    checkpoint_every: int
    checkpoint_s: float
    pictures_every: int
    collect_every: int

    def at(self, every: int, step: int) -> bool:
        """Whether something done ``every`` so many steps is due after ``step``."""
        return every > 0 and step % every == 0


@dataclass(frozen=True)
class Seen:
    """One dataset of the run: how the model sees it, the names of each sensor's bands, and what a sample costs."""

    config: ModelConfig
    bands: dict[str, tuple[str, ...]]
    cost: Cost


@dataclass
class Run:
    """All parts of a run; built by ``pretrain.py``, driven by ``train``. ``datasets``: by label in the mixture."""

    world: World
    engine: Engine
    state: TrainState
    datasets: dict[str, Seen]
    masking: MaskingConfig
    stream: TrainLoader
    rhythm: Rhythm
    checkpoints: Checkpoints
    identity: dict[str, Any]
    metrics: MetricsFile
    audit: JsonLines | None
    skipped: SkippedSteps
    meter: Meter
    nodes: Nodes
    stop: StopRequest
    watch: Watchdog
    observers: list[Observer] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``done`` or ``stopped`` (then ``why`` says by what)."""

    reason: str
    position: Position
    why: str = ""


def train(run: Run, position: Position) -> Outcome:
    """Take every step that is left. Leaves a committed checkpoint of the last one.

    Raises GuardError after too many skipped steps in a row.
    """
    rhythm, world, checkpoints = run.rhythm, run.world, run.checkpoints
    steps = run.stream.steps(position.samples, rhythm.num_steps)
    last_checkpoint = time.monotonic()
    run.meter.restart()
    with collected_every(rhythm.collect_every) as collect:
        while position.step < rhythm.num_steps:
            run.watch.note(position.step + 1, "waiting for data")
            before = time.perf_counter()
            data = next(steps)
            batches = [b.to(world.device, non_blocking=True) for b in data.batches]
            wait_s = time.perf_counter() - before

            run.watch.note(position.step + 1, "computing")
            seen = run.datasets[data.dataset]
            masks = [draw_masks(seen.config, run.masking, b) for b in batches]
            # With what every rank must know, so that a step asks the others once; it is read when the step is over, and
            # costs no waiting then.
            overdue = 0 < rhythm.checkpoint_s < time.monotonic() - last_checkpoint
            flags = [run.stop.requested(), overdue and world.is_main, checkpoints.busy]
            counts, flags = world.sum_with_flags(hidden_counts(seen.config, masks), flags)
            result = run.engine.step(position.step, batches, masks, counts)
            if run.state.ema is not None and result.skipped is None:
                run.state.ema.update()

            position = Position(
                samples=position.samples + rhythm.global_batch,
                step=position.step + 1,
                skipped_steps=position.skipped_steps + (result.skipped is not None),
            )
            run.meter.add(rhythm.global_batch, seen.cost, wait_s)
            last = position.step == rhythm.num_steps
            if run.audit is not None:
                run.audit.append({"step": position.step, **_audit(data.batches)})
            # By turns of a dataset, not by steps: in a mixture the same ones might never come at a multiple of steps.
            if last or data.dataset_step == 1 or rhythm.at(rhythm.log_every, data.dataset_step):
                _log(run, position, data, result, counts)
            if rhythm.at(rhythm.pictures_every, data.dataset_step) or (last and rhythm.pictures_every):
                views = snapshot(run.engine.model, batches[0], masks[0], seen.bands)
                _tell_picture(run, position.step, views)
            if result.skipped is not None:
                run.skipped.note(position.step, result, data.batches)

            stopping, overdue, busy = flags.tolist()
            run.watch.note(position.step, "writing")
            if checkpoints.pending and not busy:
                checkpoints.commit()
            run.skipped.end_if_too_many(checkpoints)
            if last or stopping or overdue or rhythm.at(rhythm.checkpoint_every, position.step):
                checkpoints.begin(run.state, position, run.identity, run.engine.guard.state_dict())
                last_checkpoint = time.monotonic()
            collect(position.step)
            if stopping and not last:
                checkpoints.close(partial(run.watch.note, position.step, "writing"))
                return Outcome("stopped", position, run.stop.reason or "another rank's request")
    checkpoints.close(partial(run.watch.note, position.step, "writing"))
    return Outcome("done", position)


def hidden_counts(config: ModelConfig, masks: list[dict[str, Mask]]) -> Tensor:
    """Hidden pixels per sensor (S,) over a rank's micro-batches; float64, known before any forward pass."""
    per_batch = []
    for mask in masks:
        hidden = masks_by_sensor(config, mask)
        per_batch.append(torch.stack([num_masked_values(config, s, hidden[s.name]) for s in config.sensors]))
    return torch.stack(per_batch).sum(0)


def _log(run: Run, position: Position, data: Step, result: StepResult, counts: Tensor) -> None:
    # Every rank takes part: the meter and the counters are collective. Only rank 0 writes.
    speeds = run.meter.read()
    nodes = run.nodes.read()
    counters = run.stream.counters
    counters = dict(zip(counters, run.world.sums(list(counters.values())), strict=True))
    if not run.world.is_main:
        return
    record: dict[str, Any] = {
        "step": position.step,
        "epoch": data.epoch,
        "samples": position.samples,
        "dataset": data.dataset,
        "loss": finite(result.loss),
        **_per_sensor(run.datasets[data.dataset].config.sensors, result.sums, counts),
        "lr": result.lr,
        "grad_norm": finite(result.norm),
        **speeds,
        "skipped_steps": position.skipped_steps,
        **{f"data/{name}": total for name, total in counters.items()},
        **nodes,
    }
    if (record := run.metrics.note(record)) is None:
        return
    for observer in run.observers:
        observer.logged(record)


def _per_sensor(sensors: tuple[Sensor, ...], sums: Tensor, counts: Tensor) -> dict[str, float | None]:
    pairs = zip(sensors, sums.tolist(), counts.tolist(), strict=True)
    return {f"loss/{s.name}": (finite(total / count) if count else None) for s, total, count in pairs}


def _tell_picture(run: Run, step: int, views: list[SensorView]) -> None:
    if run.world.is_main:
        for observer in run.observers:
            observer.pictured(step, views)


def _audit(batches: Sequence[Batch]) -> dict[str, Any]:
    return {"keys": [k for b in batches for k in b.keys], "digest": [digest(b) for b in batches]}

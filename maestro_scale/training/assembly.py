"""Builds a Trainer from a recipe: what pretraining and finetuning have in common."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maestro_scale.model.config import CompileMode
from maestro_scale.recipe import Recipe, RecipeError, check_world, load_recipe
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.deepspeed_check import check_deepspeed
from maestro_scale.training.distributed import World
from maestro_scale.training.ema import WeightEMA
from maestro_scale.training.engine import Engine
from maestro_scale.training.guard import Guard
from maestro_scale.training.hooks.audit import AuditHook
from maestro_scale.training.hooks.garbage_collection import GarbageCollectionHook
from maestro_scale.training.hooks.hook import Hook
from maestro_scale.training.hooks.log import LogHook
from maestro_scale.training.hooks.manifests import ManifestHook
from maestro_scale.training.hooks.skipped import SkippedStepsHook
from maestro_scale.training.manifests import ManifestMonitor, UsedDataset, manifest_digests
from maestro_scale.training.metrics.metrics_file import MetricsFile
from maestro_scale.training.objectives import Objective
from maestro_scale.training.observer import Observer
from maestro_scale.training.offload_memory import check_offload_memory
from maestro_scale.training.optimizer import SCHEDULES, Schedule, build_optimizer
from maestro_scale.training.run_dir import (
    LOCK,
    JsonLines,
    RunDirError,
    has_same_recipe,
    lock,
    write_run_files,
)
from maestro_scale.training.setup import describe_setup, first_start
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.trainer import Trainer, TrainSchedule
from maestro_scale.training.warmup import COMPILE_S, warm_up
from maestro_scale.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """The surroundings of a training. ``observers``: on rank 0."""

    recipe: Recipe
    run_dir: Path
    world: World
    observers: Sequence[Observer]
    watchdog: Watchdog
    stop: StopRequest


@dataclass(frozen=True)
class TrainingParts:
    """The parts in which trainings differ.

    ``network``: on the host; ``forward`` as the objective needs it. ``ema_decay`` 0 with ``ema_warmup`` keeps the last
    weights as the average; None keeps no average. ``ema_epochs``: between its updates; 0: every step. ``build_hooks``:
    from (engine, ema), called before checkpoints are read. ``spike``: of the guard. ``compile_mode``: of the network,
    whose steps are then compiled before the first. ``datasets``: with manifests that all ranks have compared.
    ``about``: more for environment.json.
    """

    network: nn.Module
    objective: Objective
    stream: TrainLoader
    num_steps: int
    micro_batch: int
    checkpoints: Checkpoints
    identity: dict[str, Any]
    build_hooks: Callable[[Engine, WeightEMA | None], Sequence[Hook]]
    spike: float
    ema_decay: float | None = None
    ema_warmup: bool = False
    ema_epochs: int = 0
    layer_decay: float = 1.0
    compile_mode: CompileMode = "none"
    datasets: Sequence[UsedDataset] = ()
    about: dict[str, Any] = field(default_factory=dict)


@contextmanager
def run_directory(recipe: Recipe, run_dir: Path, world: World) -> Iterator[None]:
    """Check the world size and lock the run directory; RecipeError or RunDirError. A new one is removed if nothing
    was written to it, since the run was refused."""
    check_world(recipe, world.size)
    is_new = not run_dir.exists()
    held = lock(run_dir) if world.is_main else None
    try:
        yield
    finally:
        if held is not None:
            if is_new and [p.name for p in run_dir.iterdir()] == [LOCK]:
                # While it is locked: else this could be the lock of another run, which found the directory.
                (run_dir / LOCK).unlink()
                run_dir.rmdir()
            held.release()


def seed_everything(seed: int) -> None:
    """Seed the global generators. Nothing should draw from them; a mistake then shows the same way in every run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_disk(run_dir: Path, num_parameters: int, with_ema: bool) -> None:
    """RunDirError where the disk of the run directory has no room for one checkpoint: weights, moments and average."""
    needed, free = 4 * num_parameters * (4 if with_ema else 3), shutil.disk_usage(run_dir).free
    if needed > free:
        raise RunDirError(
            f"{run_dir}: a checkpoint takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: free some, or "
            "use --run-dir on a larger disk"
        )


def check_feasible(recipe: Recipe, num_parameters: int, with_ema: bool, world: World) -> None:
    """RecipeError where DeepSpeed refuses its section or offload does not fit, before the network is allocated.

    ``recipe``: with a number as its micro-batch.
    """
    deepspeed = recipe.deepspeed_config(world.size, world.device.type)
    check_deepspeed(deepspeed)
    check_offload_memory(num_parameters, deepspeed, recipe.num_micro_batches(world.size), with_ema, world)


def assemble(context: RunContext, parts: TrainingParts) -> tuple[Trainer, Position]:
    """The trainer and its position: that of the newest checkpoint, or the start. A collective.

    Raises RecipeError, CheckpointError, RunDirError or WarmupError.
    """
    run_dir, world = context.run_dir, context.world
    # recipe.yaml keeps ``auto``, so that a resume on other GPUs chooses anew.
    recipe = context.recipe.with_micro_batch(parts.micro_batch)
    engine = _build_engine(recipe, parts, world)
    ema = None
    if parts.ema_decay is not None:
        every = parts.ema_epochs * parts.stream.steps_per_epoch or 1
        ema = WeightEMA(parts.ema_decay, engine.sharded.fragments, parts.ema_warmup, every)
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    trainer = Trainer(
        world=world,
        engine=engine,
        state=TrainState(engine.sharded, ema),
        objective=parts.objective,
        stream=parts.stream,
        schedule=TrainSchedule(
            num_steps=parts.num_steps,
            global_batch=recipe.train.global_batch,
            checkpoint_every=recipe.checkpoint.every_steps,
            checkpoint_s=60 * recipe.checkpoint.every_minutes,
        ),
        checkpoints=parts.checkpoints,
        identity=parts.identity,
        hooks=_hooks(context, parts, engine, ema, metrics),
        stop=context.stop,
        watchdog=context.watchdog,
    )
    position = trainer.resume()
    if world.is_main and (line := _new_length(context.recipe, run_dir, parts, position)):
        log.warning(line)
    _prepare_run_dir(context, parts, metrics, position)
    compiles = parts.compile_mode != "none"
    # Compilation needs the rehearsal: in the loop it would look like a hang.
    if (recipe.train.warmup_check or compiles) and position.step < parts.num_steps:
        # After the checkpoint is loaded: the rehearsal keeps AdamW's moments, and needs them allocated.
        context.watchdog.note(position.step, "starting", COMPILE_S if compiles else 0.0)
        num_micro_batches = recipe.num_micro_batches(world.size)
        warm_up(engine, world, parts.objective, parts.micro_batch, num_micro_batches, parts.compile_mode)
        context.watchdog.note(position.step, "starting")
    return trainer, position


def _new_length(recipe: Recipe, run_dir: Path, parts: TrainingParts, position: Position) -> str:
    """What a resume with another number of steps does to the schedule; empty where the number is as it was."""
    file = run_dir / "recipe.yaml"  # still that of the previous start
    if position.step == 0 or not file.exists():
        return ""
    try:
        before = load_recipe(file).train.num_steps(parts.stream.steps_per_epoch)
    except RecipeError:  # e.g. of an earlier revision
        return ""
    if before == parts.num_steps or position.step >= parts.num_steps:
        return ""
    last = recipe.lr * _schedule(recipe, before)(position.step - 1)
    following = recipe.lr * _schedule(recipe, parts.num_steps)(position.step)
    return (
        f"this run had {before} steps, now it has {parts.num_steps}: the {recipe.optim.schedule} schedule spans all of "
        f"them, so the learning rate goes from {last:.3g} in step {position.step} to {following:.3g} in step "
        f"{position.step + 1}; to begin a schedule anew, start another run with model.init_from"
    )


def _schedule(recipe: Recipe, num_steps: int) -> Schedule:
    o = recipe.optim
    return SCHEDULES[o.schedule](num_steps, o.warmup, 1 / o.start_div, 1 / o.final_div)


def _build_engine(recipe: Recipe, parts: TrainingParts, world: World) -> Engine:
    o = recipe.optim
    schedule = _schedule(recipe, parts.num_steps)
    network = parts.network.to(world.device)
    optimizer = build_optimizer(
        network, recipe.lr, o.betas, o.eps, o.weight_decay, parts.layer_decay, o.decay
    )
    deepspeed = recipe.deepspeed_config(world.size, world.device.type)
    uses_vary = len(parts.stream.sources) > 1
    return Engine(network, optimizer, schedule, deepspeed, world, Guard(parts.spike), uses_vary)


def _hooks(
    context: RunContext, parts: TrainingParts, engine: Engine, ema: WeightEMA | None, metrics: MetricsFile
) -> list[Hook]:
    """In the order that they are called in, which matters where the comments say so."""
    recipe, run_dir, world = context.recipe, context.run_dir, context.world
    train, own = recipe.train, f"rank{world.rank:05d}.jsonl"
    hooks: list[Hook] = []
    if train.audit:
        hooks.append(AuditHook(JsonLines(run_dir / "audit" / own)))
    hooks += parts.build_hooks(engine, ema)
    observers = context.observers if world.is_main else []
    # After the hooks that measure a step: what they add to FinishedStep.metrics goes into its line.
    hooks.append(LogHook(run_dir, train, world, parts.objective, metrics, observers))
    # After the log: where it ends the run, the last step has been logged.
    lines = JsonLines(run_dir / "skipped" / own)
    hooks.append(SkippedStepsHook(lines, world, engine.guard, parts.checkpoints, train.max_skipped))
    hooks.append(ManifestHook(ManifestMonitor(parts.datasets), world))
    if train.collect_every:
        hooks.append(GarbageCollectionHook(train.collect_every))
    return hooks


def _prepare_run_dir(
    context: RunContext, parts: TrainingParts, metrics: MetricsFile, position: Position
) -> None:
    """Drop what was logged after ``position``, and leave recipe.yaml and environment.json."""
    recipe, run_dir, world = context.recipe, context.run_dir, context.world
    if position.step > parts.num_steps:
        raise RecipeError(
            f"train: {run_dir} has made {position.step} steps and the recipe asks for {parts.num_steps}: ask for at "
            "least that many, or use another run directory"
        )
    for kind in ("audit", "skipped"):
        _rewind_ranks(run_dir / kind, position.step, world)
    if world.is_main:
        started = first_start(run_dir)
        if position.step == 0 and not has_same_recipe(run_dir, recipe):
            metrics.rewind(
                0
            )  # lines of a run with another recipe that was killed before its first checkpoint
            started = None
        metrics.resume_from(position.step, parts.num_steps)
        about = {
            "started": round(time.time(), 3) if started is None else started,
            "compile": parts.compile_mode,
            "micro_batch": parts.micro_batch,
            "datasets": manifest_digests(parts.datasets),
            **parts.about,
        }
        setup = describe_setup(world, recipe.train.precision_on(world.device.type))
        write_run_files(run_dir, recipe, setup=setup, **about)
    world.barrier()  # no rank may append to a file that another one still rewinds


def _rewind_ranks(folder: Path, step: int, world: World) -> None:
    # Also the files of ranks that no longer exist: the run may resume on fewer ranks.
    for i, path in enumerate(sorted(folder.glob("rank*.jsonl"))):
        if i % world.size == world.rank:
            JsonLines(path).rewind(step)

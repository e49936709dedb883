"""Pretraining, put together: from a recipe and a run directory to a finished or stopped run."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.model.config import DatasetView, ModelConfig, conflicts
from maestro_scale.model.cost import cost
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import Masking
from maestro_scale.recipe import Recipe, RecipeError, check_world, resolve_sensors
from maestro_scale.shards.manifest import Manifest
from maestro_scale.shards.store import Store
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source, labels
from maestro_scale.training.checkpoint import CheckpointError, Checkpoints, Position
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import Engine
from maestro_scale.training.loop import Outcome, Rhythm, Run, Seen, train
from maestro_scale.training.meter import Meter
from maestro_scale.training.observer import Observer, RunInfo
from maestro_scale.training.optimizer import SCHEDULES, build_optimizer
from maestro_scale.training.run_dir import JsonLines, RunDirError, environment, lock, write_atomically
from maestro_scale.training.stop import StopRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """One entry of the mixture, opened: what is stored, and how the run reads it."""

    manifest: Manifest
    source: Source


def pretrain(
    recipe: Recipe, run_dir: Path, world: World, observers: list[Observer], fresh: bool = False
) -> Outcome:
    """Train, or continue, the run in ``run_dir``; every rank calls it with the same arguments.

    Raises RecipeError, RunDirError, CheckpointError, ManifestError or BadShard, each with one clear line.
    """
    check_world(recipe, world.size)
    held = lock(run_dir) if world.is_main else None
    try:
        _refuse_unsuitable(run_dir, fresh)
        world.barrier()
        run, position = _prepare(recipe, run_dir, world, observers)
        reason = "failed"
        try:
            outcome = train(run, position)
            reason = outcome.reason
            if world.is_main and reason == "stopped":
                run.stop.clear_file()  # obeyed; the next start shall not stop again
            return outcome
        finally:
            run.stream.close()
            for observer in run.observers:
                observer.finished(reason)
    finally:
        if held is not None:
            held.release()


def build_model_config(recipe: Recipe, specs: Sequence[DatasetSpec]) -> ModelConfig:
    """The model that a recipe describes for the datasets of its mixture, as they are stored.

    RecipeError where a dataset's sensors do not fit it, the recipe, or those they share weights with.
    """
    m, entries = recipe.model, recipe.data.mixture
    first, *others = (
        DatasetView(
            label,
            resolve_sensors(spec, entry),
            spec.pos_grid,
            spec.ref_sensor,
            entry.crop_m or spec.crop_m,
        )
        for label, spec, entry in zip(labels([s.name for s in specs]), specs, entries, strict=True)
    )
    if problems := conflicts((first, *others)):
        raise RecipeError("\n".join(f"data.mixture: {p}" for p in problems))
    return ModelConfig(
        **vars(first),
        others=tuple(others),
        size=m.dimensions,
        fusion=m.fusion,
        inter_depth=m.inter_depth,
        spectral=m.spectral,
        norm=m.norm,
        target=m.target,
        loss=m.loss,
        checkpointing=m.checkpointing,
    )


def open_datasets(recipe: Recipe) -> list[Dataset]:
    """Read every manifest of the mixture and settle its sensors. RecipeError where a name or a sensor disagrees."""
    datasets = []
    for i, entry in enumerate(recipe.data.mixture):
        manifest = Manifest.load(entry.shards)
        if manifest.spec.name != entry.dataset:
            raise RecipeError(
                f"data.mixture[{i}].dataset: {entry.dataset!r}, but {entry.shards} holds {manifest.spec.name!r}"
            )
        store = Store(entry.shards, Path(recipe.data.cache_dir), int(recipe.data.cache_gib * 2**30))
        source = Source(
            spec=manifest.spec,
            sensors=resolve_sensors(manifest.spec, entry),
            crop_m=entry.crop_m or manifest.spec.crop_m,
            shards=manifest.of(entry.split),
            store=store,
            weight=entry.weight,
        )
        datasets.append(Dataset(manifest, source))
    return datasets


def identity(recipe: Recipe, config: ModelConfig, datasets: list[Dataset], world: World) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption; ``model`` is enough to rebuild the model."""
    model = {k: v for k, v in config.to_dict().items() if k != "checkpointing"}
    data = {
        "order": {
            "lanes": recipe.data.lanes,
            "shuffle_window": recipe.data.shuffle_window,
            "flips": recipe.data.flips,
        },
        # Of the splits in use: adding another split to the dataset does not change this run.
        "manifests": [
            d.manifest.digest_of(e.split) for d, e in zip(datasets, recipe.data.mixture, strict=True)
        ],
        "splits": [list(e.split) for e in recipe.data.mixture],
        "weights": [e.weight for e in recipe.data.mixture],
        "crops_m": [d.source.crop_m for d in datasets],
    }
    optim = recipe.optim.model_dump(mode="json")
    train_section = {"global_batch": recipe.train.global_batch, "masking": recipe.masking.model_dump()}
    # DeepSpeed's partitioned state is read by the number of ranks and the stage that wrote it.
    engine = {
        "zero_stage": recipe.zero_stage,
        "precision": recipe.train.precision_on(world.device.type),
        "ranks": world.size if recipe.zero_stage else None,
    }
    return {
        "seed": recipe.seed,
        "model": model,
        "data": data,
        "optim": optim,
        "train": train_section,
        "engine": engine,
    }


def _refuse_unsuitable(run_dir: Path, fresh: bool) -> None:
    # A lock file, a STOP file and what observers leave are no run.
    if fresh and any((run_dir / name).exists() for name in ("metrics.jsonl", "recipe.yaml", "checkpoints")):
        raise RunDirError(
            f"--fresh starts over only in an empty directory, and {run_dir} holds a run; use another"
        )


def _prepare(recipe: Recipe, run_dir: Path, world: World, observers: list[Observer]) -> tuple[Run, Position]:
    _seed_everything(recipe.seed)
    datasets = open_datasets(recipe)
    config = build_model_config(recipe, [d.manifest.spec for d in datasets])
    t = recipe.train
    stream = TrainLoader(
        sources=tuple(d.source for d in datasets),
        seed=recipe.seed,
        lanes=recipe.data.lanes,
        global_batch=t.global_batch,
        micro_batch=t.micro_batch,
        rank=world.rank,
        world=world.size,
        workers=recipe.data.workers,
        window=recipe.data.shuffle_window,
        flips=recipe.data.flips,
        on_bad_shard=recipe.data.on_bad_shard,
        pin=world.device.type == "cuda",
    )
    num_steps = t.steps if t.steps is not None else t.epochs * stream.steps_per_epoch
    engine = _build_engine(recipe, config, num_steps, world)
    checkpoints = Checkpoints(run_dir, world, recipe.checkpoint.keep)
    ident = identity(recipe, config, datasets, world)
    position = _resume(checkpoints, engine, ident)
    if position.step > num_steps:
        raise RecipeError(
            f"train: {run_dir} has taken {position.step} steps and the recipe asks for {num_steps}: ask for at least "
            "that many, or use another --run-dir"
        )
    metrics = JsonLines(run_dir / "metrics.jsonl")
    audit = JsonLines(run_dir / "audit" / f"rank{world.rank:05d}.jsonl") if t.audit else None
    if audit is not None:
        audit.rewind(position.step)
    run = Run(
        world=world,
        engine=engine,
        datasets=_seen(recipe, config, datasets),
        masking=Masking(**recipe.masking.model_dump()),
        stream=stream,
        rhythm=Rhythm(
            num_steps=num_steps,
            global_batch=t.global_batch,
            log_every=t.log_every,
            checkpoint_every=recipe.checkpoint.every_steps,
            pictures_every=recipe.tracking.pictures_every,
        ),
        checkpoints=checkpoints,
        identity=ident,
        metrics=metrics,
        audit=audit,
        meter=Meter(world),
        stop=StopRequest(run_dir).install(),
        observers=observers if world.is_main else [],
    )
    if world.is_main:
        metrics.rewind(position.step)
        write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
        write_atomically(run_dir / "environment.json", json.dumps(environment(), indent=1))
        info = RunInfo(run_dir, position.step, num_steps, t.global_batch)
        for observer in run.observers:
            observer.started(info)
    return run, position


def _build_engine(recipe: Recipe, config: ModelConfig, num_steps: int, world: World) -> Engine:
    model = Maestro(config).initialise(recipe.seed).to(world.device)
    o = recipe.optim
    schedule = SCHEDULES[o.schedule](num_steps, o.warmup, 1 / o.start_div, 1 / o.final_div)
    optimizer, scheduler = build_optimizer(model, recipe.lr, tuple(o.betas), o.eps, o.weight_decay, schedule)
    return Engine(model, optimizer, scheduler, recipe.deepspeed_config(world.size, world.device.type), world)


def _resume(checkpoints: Checkpoints, engine: Engine, ident: dict[str, Any]) -> Position:
    latest, problems = checkpoints.latest()
    for problem in problems:
        log.warning("checkpoint passed over: %s", problem)
    if latest is not None:
        position = checkpoints.load(engine.raw, latest, ident)
        engine.apply_schedule()
        return position
    if problems:
        raise CheckpointError(
            f"{checkpoints.dir} holds no whole checkpoint ({problems[0]}); refusing to start over in it: "
            "use another --run-dir, or remove this one"
        )
    return Position()


def _seen(recipe: Recipe, config: ModelConfig, datasets: list[Dataset]) -> dict[str, Seen]:
    seen = {}
    for view, dataset in zip(config.views, datasets, strict=True):
        spec, own = dataset.manifest.spec, config.of(view.dataset)
        bands = {s.name: tuple(spec.modality(s.source).bands[b] for b in s.bands) for s in view.sensors}
        seen[view.dataset] = Seen(own, bands, cost(own, recipe.masking.ratio).step_flops)
    return seen


def _seed_everything(seed: int) -> None:
    # Nothing should draw from these; seeding them makes a slip show the same way in every run.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

"""Pretraining, put together: from a recipe and a run directory to a finished or stopped run."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from maestro_scale.interop.partial import start_from
from maestro_scale.interop.transfer import transfer_table
from maestro_scale.model import attention
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import compute_cost, num_parameters
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig
from maestro_scale.recipe import Recipe, RecipeError, build_model_config, check_world, resolve_spec
from maestro_scale.secrets_filter import scrub_document
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.retry import RetryPolicy
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.checkpoint.checkpoints import Checkpoints, Position
from maestro_scale.training.checkpoint.mirror import Mirror
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.data import train_loader
from maestro_scale.training.deepspeed_check import check_deepspeed
from maestro_scale.training.distributed import World
from maestro_scale.training.ema import Ema
from maestro_scale.training.engine import Engine
from maestro_scale.training.guard import Guard
from maestro_scale.training.loop import Outcome, Rhythm, Run, Seen, train
from maestro_scale.training.metrics.meter import Meter
from maestro_scale.training.metrics.metrics_file import MetricsFile
from maestro_scale.training.metrics.nodes import Nodes
from maestro_scale.training.observer import Observer, RunInfo
from maestro_scale.training.offload_memory import check_offload_memory
from maestro_scale.training.optimizer import SCHEDULES, build_optimizer
from maestro_scale.training.run_dir import (
    JsonLines,
    RunDirError,
    has_same_recipe,
    lock,
    manifest_path,
    write_atomically,
    write_run_files,
)
from maestro_scale.training.skipped import SkippedSteps
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.warmup import warm_up
from maestro_scale.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """One entry of the mixture, opened: what is stored, and how the run reads it."""

    manifest: Manifest
    source: Source


def pretrain(
    recipe: Recipe,
    run_dir: Path,
    world: World,
    observers: list[Observer],
    watch: Watchdog,
    stop: StopRequest,
    fresh: bool = False,
) -> Outcome:
    """Train, or continue, the run in ``run_dir``; every rank calls it with the same arguments.

    Raises RecipeError, RunDirError, CheckpointError, GuardError, ManifestError or BadShard, each with one clear line.
    """
    check_world(recipe, world.size)
    held = lock(run_dir) if world.is_main else None
    try:
        if fresh:
            _refuse_unless_new(recipe, run_dir, world)
        world.barrier()
        run, position = _prepare(recipe, run_dir, world, observers, watch, stop)
        reason = "failed"
        try:
            outcome = train(run, position)
            reason = outcome.reason
            if world.is_main and reason == "stopped":
                run.stop.clear_file()  # obeyed; the next start shall not stop again
            return outcome
        finally:
            watch.note(position.step, "ending")
            run.stream.close()
            for observer in run.observers:
                observer.finished(reason)
    finally:
        if held is not None:
            held.release()


def open_datasets(recipe: Recipe) -> list[Dataset]:
    """Read every manifest of the mixture and resolve its spec. RecipeError where the recipe does not fit it."""
    datasets = []
    for i, entry in enumerate(recipe.data.mixture):
        manifest = Manifest.load(entry.shards)
        store = Store(
            entry.shards,
            Path(recipe.data.cache_dir),
            int(recipe.data.cache_gib * 2**30),
            RetryPolicy.with_deadline(recipe.data.retry_s),
        )
        source = Source(
            spec=resolve_spec(manifest.spec, entry, i),
            shards=manifest.shards_of(entry.split),
            store=store,
            weight=entry.weight,
        )
        datasets.append(Dataset(manifest, source))
    return datasets


def identity(recipe: Recipe, config: ModelConfig, datasets: list[Dataset], world: World) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption; ``model`` is enough to rebuild the model."""
    model = {k: v for k, v in config.to_dict().items() if k not in ModelConfig.RUNTIME_FIELDS}
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
        "crops_m": [d.source.spec.crop_m for d in datasets],
    }
    optim = recipe.optim.model_dump(mode="json")
    train_section = {"global_batch": recipe.train.global_batch, "masking": recipe.masking.model_dump()}
    # Neither the ZeRO stage nor the number of ranks: the state on disk does not depend on them.
    engine = {"precision": recipe.train.precision_on(world.device.type)}
    return {
        "seed": recipe.seed,
        "model": model,
        "data": data,
        "optim": optim,
        "train": train_section,
        "engine": engine,
    }


def _refuse_unless_new(recipe: Recipe, run_dir: Path, world: World) -> None:
    # A lock file, a STOP file and what observers leave are no run.
    if any((run_dir / name).exists() for name in ("metrics.jsonl", "recipe.yaml", "checkpoints")):
        raise RunDirError(
            f"--fresh starts over only in an empty directory, and {run_dir} holds a run; use another"
        )
    mirror = _mirror(recipe, run_dir) if world.is_main else None
    if mirror is not None and (names := mirror.names()):
        raise RunDirError(
            f"--fresh starts over, and {mirror.url} holds {names[0]} of a run of this name: use another --run-dir or "
            "checkpoint.mirror"
        )


def _retention(recipe: Recipe) -> Retention:
    return Retention(recipe.checkpoint.keep, recipe.checkpoint.keep_every)


def _mirror(recipe: Recipe, run_dir: Path) -> Mirror | None:
    url = recipe.checkpoint.mirror
    return Mirror(f"{url.rstrip('/')}/{run_dir.resolve().name}", _retention(recipe)) if url else None


def _prepare(
    recipe: Recipe,
    run_dir: Path,
    world: World,
    observers: list[Observer],
    watch: Watchdog,
    stop: StopRequest,
) -> tuple[Run, Position]:
    _seed_everything(recipe.seed)
    datasets = open_datasets(recipe)
    config = build_model_config(recipe, [d.source.spec for d in datasets])
    t = recipe.train
    stream, num_steps = train_loader(recipe, [d.source for d in datasets], world)
    c = recipe.checkpoint
    checkpoints = Checkpoints(run_dir, world, _retention(recipe), _mirror(recipe, run_dir))
    deepspeed = recipe.deepspeed_config(world.size, world.device.type)
    check_deepspeed(deepspeed)
    num_micro_batches = recipe.num_micro_batches(world.size)
    check_offload_memory(num_parameters(config), deepspeed, num_micro_batches, bool(recipe.optim.ema), world)
    engine, kernel = _build_engine(recipe, config, num_steps, world, begins=checkpoints.latest()[0] is None)
    ema = Ema(recipe.optim.ema, engine.sharded.fragments) if recipe.optim.ema else None
    state = TrainState(engine.sharded, ema)
    ident = identity(recipe, config, datasets, world)
    position, memory = checkpoints.resume(state, ident)
    if memory is not None:
        engine.guard.load_state_dict(memory)
    if position.step > num_steps:
        raise RecipeError(
            f"train: {run_dir} has taken {position.step} steps and the recipe asks for {num_steps}: ask for at least "
            "that many, or use another --run-dir"
        )
    if t.warmup_check and position.step < num_steps:
        watch.note(position.step, "starting")
        _rehearse(recipe, config, datasets, engine, world)
    for kind in ("audit", "skipped"):
        _rewind_ranks(run_dir / kind, position.step, world)
    world.barrier()
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    own = f"rank{world.rank:05d}.jsonl"
    skipped = SkippedSteps(JsonLines(run_dir / "skipped" / own), world, engine.guard, t.max_skipped)
    run = Run(
        world=world,
        engine=engine,
        state=state,
        datasets=_seen(recipe, config, datasets),
        masking=MaskingConfig(**recipe.masking.model_dump()),
        stream=stream,
        rhythm=Rhythm(
            num_steps=num_steps,
            global_batch=t.global_batch,
            log_every=t.log_every,
            checkpoint_every=c.every_steps,
            checkpoint_s=60 * c.every_minutes,
            pictures_every=recipe.tracking.pictures_every,
            collect_every=t.collect_every,
        ),
        checkpoints=checkpoints,
        identity=ident,
        metrics=metrics,
        audit=JsonLines(run_dir / "audit" / own) if t.audit else None,
        skipped=skipped,
        meter=Meter(world),
        nodes=Nodes(world),
        stop=stop,
        watch=watch,
        observers=observers if world.is_main else [],
    )
    if world.is_main:
        if position.step == 0 and not has_same_recipe(run_dir, recipe):
            metrics.rewind(0)  # what another recipe did before its first checkpoint
        metrics.go_on(position.step, num_steps)
        write_run_files(run_dir, recipe, attention=kernel, compile=recipe.model.compile)
        for number, dataset in enumerate(datasets):
            path = manifest_path(run_dir, number, dataset.manifest.spec.name)
            write_atomically(path, scrub_document(dataset.manifest.dumps()))
        info = RunInfo(run_dir, position.step, num_steps, t.global_batch)
        for observer in run.observers:
            observer.started(info)
    return run, position


def _build_engine(
    recipe: Recipe, config: ModelConfig, num_steps: int, world: World, begins: bool
) -> tuple[Engine, str]:
    """The engine, and the attention kernel it will use. ``begins``: there is no checkpoint that it will load."""
    kernel = _attention_kernel(recipe, config, world)
    model = Maestro(config).initialise(recipe.seed)
    if recipe.model.init_from is not None and begins:
        parts = start_from(model, recipe.model.init_from)
        if world.is_main:
            Console(width=110).print(
                transfer_table(parts, f"{recipe.name} starts from {recipe.model.init_from}")
            )
    model = model.to(world.device)
    if recipe.model.compile:
        model.compile_blocks()
    o = recipe.optim
    schedule = SCHEDULES[o.schedule](num_steps, o.warmup, 1 / o.start_div, 1 / o.final_div)
    optimizer = build_optimizer(model, recipe.lr, tuple(o.betas), o.eps, o.weight_decay)
    guard = Guard(recipe.train.spike)
    deepspeed = recipe.deepspeed_config(world.size, world.device.type)
    return Engine(model, optimizer, schedule, deepspeed, world, guard), kernel


def _attention_kernel(recipe: Recipe, config: ModelConfig, world: World) -> str:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.train.precision_on(world.device.type)]
    size = config.size
    try:
        kernels = [
            attention.resolve_backend(config.attention, world.device, dtype, dim)
            for dim in dict.fromkeys((size.dim_head, size.decoder_dim_head))
        ]
    except ValueError as error:
        raise RecipeError(str(error)) from None
    kernel = ", ".join(dict.fromkeys(kernels))
    if world.is_main:
        log.info("attention: %s (%s) on %s", kernel, config.attention, world.device.type)
    return kernel


def _rehearse(
    recipe: Recipe, config: ModelConfig, datasets: list[Dataset], engine: Engine, world: World
) -> None:
    """A step on made-up data of the dataset that takes the most memory."""
    t, ratio = recipe.train, recipe.masking.ratio
    largest, dataset = max(
        zip(config.views, datasets, strict=True),
        key=lambda pair: compute_cost(config.for_dataset(pair[0].dataset), ratio).activations,
    )
    batch = mock_batch(dataset.source, largest.dataset, t.micro_batch)
    num_micro_batches = recipe.num_micro_batches(world.size)
    own, masking = config.for_dataset(largest.dataset), MaskingConfig(**recipe.masking.model_dump())
    warm_up(engine, world, own, masking, batch, num_micro_batches)


def _rewind_ranks(folder: Path, step: int, world: World) -> None:
    # Also of ranks that are no more: the run may go on with fewer of them.
    for i, path in enumerate(sorted(folder.glob("rank*.jsonl"))):
        if i % world.size == world.rank:
            JsonLines(path).rewind(step)


def _seen(recipe: Recipe, config: ModelConfig, datasets: list[Dataset]) -> dict[str, Seen]:
    seen = {}
    for view, dataset in zip(config.views, datasets, strict=True):
        spec, own = dataset.source.spec, config.for_dataset(view.dataset)
        bands = {s.name: tuple(spec.modality(s.source).bands[b] for b in s.bands) for s in view.sensors}
        seen[view.dataset] = Seen(own, bands, compute_cost(own, recipe.masking.ratio))
    return seen


def _seed_everything(seed: int) -> None:
    # Nothing should draw from these; seeding them makes a slip show the same way in every run.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

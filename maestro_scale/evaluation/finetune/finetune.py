"""Finetuning on a benchmark: the encoder and a head learn together from the training labels, in the same engine as
pretraining; validation says which weights answer the test split, and when to stop.

What is validated and tested is the moving average of the weights (``evaluation.ema``), as in the paper. ``scratch`` is
the same network and the same course without pretraining.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maestro_scale.evaluation.benchmark import BATCH_SIZE, Benchmark, Provenance, build_result
from maestro_scale.evaluation.features.adapt import encoder_spec
from maestro_scale.evaluation.features.baselines import ImageEncoder
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.finetune import early_stop
from maestro_scale.evaluation.finetune.average import Average
from maestro_scale.evaluation.finetune.early_stop import Validated
from maestro_scale.evaluation.finetune.predictor import Predictor, build_predictor
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.evaluation.tasks.first_maps import FirstMaps
from maestro_scale.evaluation.tasks.losses import TargetLoss, target_loss_for
from maestro_scale.evaluation.tasks.subset import labelled_subset
from maestro_scale.evaluation.tasks.task import Predictions, task_for
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe, check_world
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.progress import Progress
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.loader import Step, TrainLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.checkpoint.checkpoints import Checkpoints, Position
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.data import train_loader
from maestro_scale.training.deepspeed_check import check_deepspeed
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import Engine, StepResult
from maestro_scale.training.guard import Guard, GuardError
from maestro_scale.training.optimizer import SCHEDULES, build_optimizer
from maestro_scale.training.run_dir import JsonLines, finite, lock, write_run_files
from maestro_scale.training.stop import StopRequest

MODES = ("finetune", "scratch")

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A run was asked to stop, and did so at a checkpoint; its argument is the run's folder."""


@dataclass
class Run:
    """One finetuning; what is validated and tested is ``average``."""

    objective: TargetLoss
    splits: dict[str, Source]
    world: World
    recipe: Recipe
    dir: Path
    num_steps: int
    stream: TrainLoader
    engine: Engine
    state: TrainState
    average: Average
    checkpoints: Checkpoints
    identity: dict[str, Any]
    manifest: Manifest
    stop: StopRequest
    history: list[Validated] = field(default_factory=list)


def finetune(
    encoder: Maestro | ImageEncoder,
    benchmark: Benchmark,
    recipe: Recipe,
    mode: str,
    run_dir: Path,
    world: World,
    provenance: Provenance,
    maps_dir: Path | None = None,
    progress: ProgressFactory = no_progress,
) -> EvalResult | None:
    """The result of ``mode`` on rank 0; None on the other ranks. ``maps_dir``: for predictions of whole test tiles.

    The same call again continues after the last checkpoint in ``run_dir``. Stopped, on all ranks, where the run was
    asked to stop. EvaluationError, RecipeError, CheckpointError, GuardError, ManifestError or BadShard, each with one
    clear line.
    """
    check_world(recipe, world.size)
    held = lock(run_dir) if world.is_main else None
    try:
        started = time.perf_counter()
        run, position = _prepare(encoder, benchmark, recipe, mode, run_dir, world)
        maps = maps_dir and TileMapWriter(maps_dir, run.splits["test"], run.objective.task)
        try:
            with progress(f"{mode} {run.manifest.spec.name}", "steps") as report:
                stopped = _train(run, position, report)
        finally:
            run.stream.close()
        if stopped:
            if world.is_main:
                run.stop.clear_file()
            raise Stopped(run_dir)
        chosen = early_stop.best(run.history)
        run.average.load(_weights(run.dir, "best", chosen.step))
        answer = _answers(run, "test", maps)
        if maps:
            maps.close()
        if not world.is_main:
            return None
        said = {"step": float(chosen.step), "validation": chosen.score}
        answer = replace(answer, chosen=said)
        timings = {"fit_s": time.perf_counter() - started}
        return build_result(benchmark, run.manifest, mode, run.objective.task, answer, provenance, timings)
    finally:
        if held is not None:
            held.release()


def _prepare(
    encoder: Maestro | ImageEncoder,
    benchmark: Benchmark,
    recipe: Recipe,
    mode: str,
    run_dir: Path,
    world: World,
) -> tuple[Run, Position]:
    manifest = Manifest.load(benchmark.shards)
    spec = encoder_spec(encoder, benchmark.spec)
    objective = target_loss_for(task_for(spec, benchmark.target))
    store = Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes)
    train, fraction = benchmark.train_split(manifest)
    splits = {
        name: Source(spec, manifest.shards_of(benchmark.stored_splits(split)), store)
        for name, split in (("train", train), ("val", "val"), ("test", "test"))
    }
    if fraction < 1:
        used = labelled_subset(splits["train"], objective.task.target, fraction, recipe.seed, world)
        splits["train"] = splits["train"].select_samples(used)
    t = recipe.train
    stream, num_steps = train_loader(recipe, [splits["train"]], world)
    network = build_predictor(encoder, manifest.spec.name, objective, recipe.seed, mode == "finetune")
    identity = {
        "seed": recipe.seed,
        "weights": weights_digest(network),
        "data": manifest.digest_of((*benchmark.stored_splits(train), *benchmark.stored_splits("val"))),
        "fraction": benchmark.fraction,
        "target": objective.task.target.name,
        "crop_m": spec.crop_m,
        "optim": recipe.optim.model_dump(mode="json"),
        "global_batch": t.global_batch,
        "lanes": recipe.data.lanes,
        "flips": recipe.data.flips,
        "num_steps": num_steps,
        "validations": recipe.evaluation.validations,
        "ema": recipe.evaluation.ema,
        "layer_decay": recipe.evaluation.layer_decay,
        "precision": t.precision_on(world.device.type),
    }
    shadow = build_predictor(encoder, manifest.spec.name, objective, recipe.seed, mode == "finetune")
    shadow = shadow.to(world.device).requires_grad_(False).eval()
    engine = _engine(recipe, network.to(world.device), num_steps, mode, world)
    run = Run(
        objective=objective,
        splits=splits,
        world=world,
        recipe=recipe,
        dir=run_dir,
        num_steps=num_steps,
        stream=stream,
        engine=engine,
        state=TrainState(engine.sharded, None),
        average=Average(network, shadow, recipe.evaluation.ema),
        checkpoints=Checkpoints(run_dir, world, Retention(keep=1)),
        identity=identity,
        manifest=manifest,
        stop=StopRequest(run_dir).install(),
    )
    position = _resume(run)
    if world.is_main:
        for name in ("metrics", "validation"):
            JsonLines(run_dir / f"{name}.jsonl").rewind(position.step)
        write_run_files(run_dir, recipe)
    world.barrier()
    run.history = [Validated(**line) for line in JsonLines(run_dir / "validation.jsonl").read()]
    return run, position


def _engine(recipe: Recipe, network: Predictor, num_steps: int, mode: str, world: World) -> Engine:
    o = recipe.optim
    schedule = SCHEDULES[o.schedule](num_steps, o.warmup, 1 / o.start_div, 1 / o.final_div)
    # What has learned nothing yet has nothing to keep.
    layer_decay = recipe.evaluation.layer_decay if mode == "finetune" else 1.0
    optimizer = build_optimizer(network, recipe.lr, tuple(o.betas), o.eps, o.weight_decay, layer_decay)
    deepspeed = recipe.deepspeed_config(world.size, world.device.type)
    check_deepspeed(deepspeed)
    return Engine(network, optimizer, schedule, deepspeed, world, Guard(recipe.train.spike))


def _resume(run: Run) -> Position:
    position, memory = run.checkpoints.resume(run.state, run.identity)
    if memory is not None:
        run.engine.guard.load_state_dict(memory)
        run.average.load(_weights(run.dir, "average", position.step))
    return position


def _train(run: Run, position: Position, report: Progress) -> bool:
    """Take the steps that are left, or until validation gets no better; whether the run was asked to stop before."""
    recipe, world = run.recipe, run.world
    metrics = JsonLines(run.dir / "metrics.jsonl")
    steps = run.stream.steps(position.samples, run.num_steps)
    while position.step < run.num_steps and not _is_over(run):
        data = next(steps)
        result = _step(run, data, position.step)
        position = Position(
            samples=data.samples,
            step=data.step,
            skipped_steps=position.skipped_steps + (result.skipped is not None),
        )
        report(position.step, run.num_steps, 0)
        last = position.step == run.num_steps
        if last or position.step % recipe.train.log_every == 0:
            record = {"step": data.step, "epoch": data.epoch, "samples": data.samples}
            record |= {"loss": finite(result.loss), "lr": result.lr, "grad_norm": finite(result.norm)}
            record["skipped_steps"] = position.skipped_steps
            if world.is_main:
                metrics.append(record)
        validated = early_stop.due(position.step, run.num_steps, recipe.evaluation.validations)
        if validated:
            _validate(run, position.step)
        stopping = world.any(run.stop.requested())
        if validated or stopping or position.step % recipe.checkpoint.every_steps == 0:
            _save(run, position)
        if stopping and not last:
            return True
    return False


def _is_over(run: Run) -> bool:
    return early_stop.exhausted(run.history, run.recipe.evaluation.patience)


def _step(run: Run, data: Step, finished: int) -> StepResult:
    """One optimizer step after ``finished`` ones."""
    against = [run.objective.loss_targets(run.objective.task.labels(b)) for b in data.batches]
    num_terms = sum(run.objective.num_terms(x) for x in against)
    device = run.world.device
    counts = run.world.sum(torch.tensor([num_terms], dtype=torch.float64, device=device))
    batches = [b.to(device, non_blocking=True) for b in data.batches]
    result = run.engine.step(finished, batches, [x.to(device) for x in against], counts)
    if result.skipped is None:
        run.average.update(data.step)
    elif run.engine.guard.in_a_row >= run.recipe.train.max_skipped:
        raise GuardError(
            f"{run.dir}: {run.engine.guard.in_a_row} steps in a row were skipped, the last as {result.skipped}"
        )
    return result


def _validate(run: Run, step: int) -> None:
    """Score the average on validation, note it, and keep it if it is the best so far."""
    task, answer = run.objective.task, _answers(run, "val")
    score = float(task.statistic(answer.counts.sum(axis=0, dtype=np.int64)))
    best_index([score])
    run.history.append(Validated(step, score))
    if run.world.is_main:
        if early_stop.best(run.history).step == step:
            run.average.save(_weights(run.dir, "best", step))
        JsonLines(run.dir / "validation.jsonl").append(asdict(run.history[-1]))


def _save(run: Run, position: Position) -> None:
    if run.world.is_main:
        run.average.save(_weights(run.dir, "average", position.step))
    run.checkpoints.begin(run.state, position, run.identity, run.engine.guard.state_dict())
    run.checkpoints.finish()
    if run.world.is_main:  # only now: a run that was killed before goes back to the checkpoint before
        kept = {_weights(run.dir, "average", position.step)}
        if run.history:
            kept.add(_weights(run.dir, "best", early_stop.best(run.history).step))
        for path in {*run.dir.glob("average/step_*"), *run.dir.glob("best/step_*")} - kept:
            path.unlink()


@torch.no_grad()
def _answers(run: Run, split: str, maps_of_all: TileMapWriter | None = None) -> Predictions:
    """What the shadow makes of a split, from whole tiles, each once; the same on all ranks."""
    objective, world, source = run.objective, run.world, run.splits[split]
    # Whole tiles in a batch, as many as fit.
    size = objective.num_crops * max(BATCH_SIZE // objective.num_crops, 1)
    loader = EvalLoader(
        source, size, world.rank, world.size, workers=run.recipe.data.workers, crops=objective.num_crops
    )
    tiles = np.zeros((loader.num_samples, *objective.tile_shape))
    at, maps = loader.first_row // objective.num_crops, FirstMaps(loader.num_samples)
    for batch in loader:
        logits, labels = run.average.shadow.logits(batch.to(world.device)), objective.task.labels(batch)
        part = objective.per_tile(logits, labels)
        maps.add(at, objective.first_maps(logits, labels))
        tiles[at : at + len(part)] = part
        for number, whole in enumerate(run.objective.tile_maps(logits) if maps_of_all else (), at):
            maps_of_all.write(number, whole)
        at += len(part)
    # Every tile is one rank's, and nothing is added to it.
    answer = objective.predictions(world.sum(torch.from_numpy(tiles).to(world.device)).cpu().numpy())
    return replace(answer, maps=maps.gather(world))


def _weights(run_dir: Path, kind: str, step: int) -> Path:
    return run_dir / kind / f"step_{step:08d}.safetensors"

"""Finetuning on a benchmark: an encoder and a head learn from labels; the best validated weights are tested.

It is the same trainer as pretraining with another objective. What is validated and tested is the moving average of the
weights (``evaluation.ema``), as in the paper. Mode ``scratch`` trains the same network with the same settings from
freshly initialised weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from maestro_scale.evaluation.baselines.baseline import TrainableBaseline
from maestro_scale.evaluation.benchmark import Benchmark, Provenance, build_result
from maestro_scale.evaluation.finetune.predictions import predict_split
from maestro_scale.evaluation.finetune.predictor import MaestroPredictor
from maestro_scale.evaluation.finetune.setup import Finetuning
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.interop.export import write_finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe
from maestro_scale.training.assembly import RunContext, run_directory
from maestro_scale.training.distributed import World
from maestro_scale.training.observer import Observer
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import Watchdog, monitored

MODES = ("finetune", "scratch")


class Stopped(Exception):
    """A run was asked to stop, and did so at a checkpoint; its argument is the run's folder."""


def finetune(
    encoder: Maestro | TrainableBaseline,
    benchmark: Benchmark,
    recipe: Recipe,
    mode: str,
    run_dir: Path,
    world: World,
    provenance: Provenance,
    maps_dir: Path | None = None,
    progress: ProgressFactory = no_progress,
    observers: Sequence[Observer] = (),
    checkpoint: Path | None = None,
    stop: StopRequest | None = None,
    watchdog: Watchdog | None = None,
) -> EvalResult | None:
    """The result of ``mode`` on rank 0; None on the other ranks. The same call again resumes in ``run_dir``.

    ``maps_dir``: for predictions of whole test tiles. ``observers``: on rank 0, called for every logged step.
    ``checkpoint``: where the encoder comes from, for environment.json. ``stop``: shared by consecutive finetunings, so
    that a signal after the last step of one, while it is tested, stops the next. ``watchdog``: that of the evaluation,
    which has paused; None: one is started. Raises Stopped, on all ranks, where the run was asked to stop, and
    MaestroError with one clear line.
    """
    started = time.perf_counter()
    stop = stop or StopRequest()
    stop.run_dir = run_dir
    stop.install()
    with run_directory(recipe, run_dir, world):
        world.barrier()
        guarded = (
            nullcontext(watchdog) if watchdog else monitored(world, recipe.train.hang_timeout_s, run_dir)
        )
        with guarded as watching:
            watching.write_stacks_to(run_dir)
            watching.pause()  # finding a fraction of the labels may read every shard
            run = Finetuning(encoder, benchmark, mode, checkpoint, recipe, world)
            maps = TileMapWriter(maps_dir, run.splits["test"], run.target_loss.task) if maps_dir else None
            watching.note(0, "starting")
            context = RunContext(recipe, run_dir, world, observers, watching, stop)
            with progress(f"{mode} {run.manifest.spec.name}", "steps") as report:
                trainer, position = run.assemble(context, report)
                outcome = trainer.run(position)
            # The process may finetune again, with another seed or from scratch.
            trainer.engine.close()
            if outcome.reason == "stopped":
                raise Stopped(run_dir)
            on_batch = partial(watching.note, outcome.position.step, "ending")
            on_batch()
            network = run.validation.load_best()
            predictions = predict_split(
                network,
                run.splits["test"],
                world,
                recipe.data.workers,
                recipe.train.precision,
                maps,
                on_batch,
            )
            watching.pause()
        if maps is not None:
            maps.close()
    if not world.is_main:
        return None
    best = run.validation.best
    chosen = {"step": float(best.step), "validation": best.score}
    timings = {"fit_s": time.perf_counter() - started}
    task = run.target_loss.task
    result = build_result(
        benchmark, run.manifest, mode, task, replace(predictions, chosen=chosen), provenance, timings
    )
    if isinstance(network, MaestroPredictor):  # a baseline is a library's encoder, which is not exported
        write_finetuned(run_dir, run.record(network, result))
    return result

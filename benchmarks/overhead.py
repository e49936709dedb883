"""Cost of a training step apart from the model: the training loop, and one log line.

    python -m benchmarks.overhead --work /tmp/overhead
    torchrun --nproc-per-node=2 -m benchmarks.overhead --work /tmp/overhead    # with the collectives of two ranks

Runs the unmodified trainer, with its loop, log, terminal output, MLflow store and watchdog, on synthetic TreeSatAI-TS
shards. All steps use the same batch in memory, so that data loading does not count; `without model` also reuses the
result of the first step for all later ones. Steps with and without a log line alternate and medians are compared, so
that load from other processes affects both alike. Prints a table and writes benchmarks/results/overhead.json; exit
code 1 if the loop takes 2 ms or more, or a log line 1 % of a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from maestro_scale.recipe import Recipe, load_recipe
from maestro_scale.stream.loader import Step, TrainLoader
from maestro_scale.tracking.observers import observers_for
from maestro_scale.training.distributed import World, destroy_process_group, init_distributed
from maestro_scale.training.engine import Engine, StepResult
from maestro_scale.training.pretrain import pretrain
from maestro_scale.training.run_dir import git_revision
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import Watchdog

MAX_LOOP_MS, MAX_LOG_SHARE = 2.0, 0.01
WARMUP_STEPS = 10  # not counted: they open files and choose kernels
RECIPE = Path(__file__).parents[1] / "recipes" / "vitt.yaml"


def make_shards(work: Path) -> Path:
    """Write a few synthetic tiles as shards, unless they exist."""
    shards = work / "shards"
    if not (shards / "manifest.json").exists():
        program = str(Path(sys.executable).parent / "maestro-scale")
        dataset, raw = "treesatai_ts", str(work / "raw")
        subprocess.run([program, "synth", dataset, raw, "--tiles=160"], check=True)
        subprocess.run([program, "shard", dataset, raw, str(shards), "--split=train"], check=True)
    return shards


def step_times(recipe: Recipe, run_dir: Path, world: World, model: bool) -> list[float]:
    """Seconds of each step, without the first ``WARMUP_STEPS``; every second step writes a log line."""
    marks: list[float] = []
    steps, step = TrainLoader.steps, Engine.step
    first: list[StepResult] = []

    def repeat_batch(self: TrainLoader, start_samples: int, num_steps: int) -> Iterator[Step]:
        data = next(steps(self, start_samples, num_steps))
        for turn in range(1, num_steps + 1):
            marks.append(time.perf_counter())
            yield replace(data, dataset_step=turn)

    def reuse_result(self: Engine, *args: Any) -> StepResult:
        if not first:
            first.append(step(self, *args))
        return first[0]

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(TrainLoader, "steps", repeat_batch))
        if not model:
            patched.enter_context(mock.patch.object(Engine, "step", reuse_result))
        watch = Watchdog(world, recipe.train.hang_timeout_s, run_dir).start()
        observers = observers_for(recipe) if world.is_main else []
        pretrain(recipe, run_dir, world, observers, watch, StopRequest(run_dir).install())
        watch.stop()
    return [b - a for a, b in itertools.pairwise(marks)][WARMUP_STEPS:]


def measure(recipe: Recipe, run_dir: Path, world: World, model: bool) -> dict[str, float]:
    """Medians in milliseconds. ``log_ms``: of the differences between consecutive steps with and without a log line."""
    times = step_times(recipe, run_dir, world, model)
    logged, quiet = times[1::2], times[::2]  # marks begin at step 1, WARMUP_STEPS is even, log_every is 2
    pairs = [a - b for a, b in zip(logged, quiet, strict=False)]
    return {
        "step_ms": 1000 * statistics.median(quiet),
        "log_ms": 1000 * statistics.median(pairs),
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and runs")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="of TreeSatAI-TS")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument("--batch", type=int, default=8, help="samples per rank and step")
    parser.add_argument("--steps", type=int, default=400, help="without model")
    parser.add_argument("--model-steps", type=int, default=60, help="with the model")
    args = parser.parse_args()
    if int(os.environ.get("RANK", 0)) == 0:
        make_shards(args.work)
    world = init_distributed()
    world.barrier()
    work = args.work / f"runs-{world.size}"
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{args.work.resolve() / 'mlflow.db'}")
    found = {}
    for name, model, steps in ("without model", False, args.steps), ("with model", True, args.model_steps):
        run_dir = work / name.replace(" ", "_")
        if world.is_main:
            shutil.rmtree(run_dir, ignore_errors=True)
        world.barrier()
        recipe = load_recipe(
            args.recipe,
            [
                f"data.mixture[0].shards={json.dumps(str(args.work / 'shards'))}",
                "data.mixture[0].split=train",
                f"data.cache_dir={json.dumps(str(args.work / 'cache'))}",
                f"train.steps={WARMUP_STEPS + steps}",
                f"train.global_batch={args.batch * world.size}",
                f"train.micro_batch={args.batch}",
                "train.log_every=2",
                "data.workers=1",
                f"data.lanes={world.size}",
                "tracking.pictures_every=0",
                "checkpoint.every_steps=1000000",
                "checkpoint.every_minutes=0",
                *args.overrides,
            ],
        )
        found[name] = measure(recipe, run_dir, world, model)
    if world.is_main:
        share = found["with model"]["log_ms"] / found["with model"]["step_ms"]
        report(found, share, world, recipe)
        good = found["without model"]["step_ms"] < MAX_LOOP_MS and share < MAX_LOG_SHARE
    destroy_process_group()
    return 0 if not world.is_main or good else 1


def report(found: dict[str, dict[str, float]], share: float, world: World, recipe: Recipe) -> None:
    """Print the table and write the results file."""
    table = Table(
        title=f"milliseconds, {world.size} rank(s), MAESTRO {recipe.model.size} on {world.device.type}"
    )
    for column in ("", "step", "log line"):
        table.add_column(column, justify="right")
    for name, row in found.items():
        table.add_row(name, f"{row['step_ms']:.2f}", f"{row['log_ms']:.2f}")
    Console().print(table)
    print(f"logging every step costs {100 * share:.2f} % of the throughput")
    path = Path(__file__).parent / "results" / "overhead.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[f"{world.device.type}, {world.size} rank(s)"] = {
        "revision": git_revision(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "size": recipe.model.size,
        "batch_per_rank": recipe.train.micro_batch,
        "log_share": share,
        **found,
    }
    path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

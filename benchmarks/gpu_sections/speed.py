"""Sections: samples/s and MFU by case and compile mode, and the same with the loader."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import SPEED_CASES, Case, case_recipe, config_of, rehearsed
from benchmarks.gpu_sections.data import write_synthetic
from benchmarks.gpu_sections.estimate import estimate
from benchmarks.gpu_sections.training import StepClock, StopAfter, run_on_mock_batch, run_on_shards
from maestro_scale.model.cost import compute_cost
from maestro_scale.recipe import Recipe
from maestro_scale.training.metrics.meter import peak_tflops

MODES = ("none", "blocks", "step")
_REPEATS = 3
_WORKERS = 12


def run(bench: Bench) -> None:
    """All cases in eager mode, then compiled, as far as time allows; no data is loaded."""
    cases = rehearsed(SPEED_CASES, 1) if bench.rehearse else SPEED_CASES
    rows: list[dict[str, Any]] = []
    pairs = [(case, mode) for mode in MODES for case in cases]
    for case, mode in pairs:
        if bench.record.left_s < 15 and not bench.rehearse:
            rows.append({"case": case.title, "mode": mode, "skipped": "no time left"})
            bench.record.put(rows=rows)
            continue
        recipe = case_recipe(case, bench.rehearse, f"model.compile={mode}")
        warmup, repeats, length = (6, _REPEATS, 8) if bench.device.is_gpu else (1, 2, 1)
        clock = StepClock(bench.device, warmup, repeats, length, bench.record.ends_at)
        bench.free()
        run_on_mock_batch(bench, recipe, "speed", [clock])
        rows.append({"case": case.title, "mode": mode, **describe(bench, recipe, clock)})
        bench.record.put(rows=rows)


def precompile(bench: Bench) -> None:
    """Fill the caches of the compiler for ``run``, while sections that measure no time are running."""
    cases = rehearsed(SPEED_CASES, 1) if bench.rehearse else SPEED_CASES
    for mode in ("blocks",) if bench.rehearse else MODES[1:]:  # a rehearsal compiles both in `run`
        for case in cases:
            started = time.perf_counter()
            recipe = case_recipe(case, bench.rehearse, f"model.compile={mode}")
            run_on_mock_batch(bench, recipe, "precompile", [StopAfter(2)])
            bench.record.put(**{f"{case.title} {mode}": {"seconds": time.perf_counter() - started}})


def run_loader(bench: Bench) -> None:
    """A large micro-batch with the real loader, from shards on the local disk."""
    case = rehearsed(SPEED_CASES, 2)[1] if bench.rehearse else Case("treesatai_ts", "base", 128)
    shards = write_synthetic(bench.work, case.dataset, {"train": bench.pick(256, 8)})
    recipe = case_recipe(
        case,
        bench.rehearse,
        f"data.mixture[0].shards={shards}",
        "data.mixture[0].split=[train]",
        f"data.cache_dir={bench.work / 'cache'}",
        f"data.workers={bench.pick(_WORKERS, 1)}",
    )
    warmup, repeats, length = (10, _REPEATS, 15) if bench.device.is_gpu else (1, 2, 1)
    clock = StepClock(bench.device, warmup, repeats, length, bench.record.ends_at)
    bench.free()
    run_on_shards(bench, recipe, "loader", [clock])
    row = {"case": case.title, "workers": recipe.data.workers, **describe(bench, recipe, clock)}
    bench.record.put(row=row)


def describe(bench: Bench, recipe: Recipe, clock: StepClock) -> dict[str, Any]:
    """Speeds of the windows: median, smallest and largest; MFU of the median; and plan's prediction."""
    samples = recipe.train.global_batch
    speeds = sorted(samples / s for s in clock.step_s)
    median = statistics.median(speeds)
    cost = compute_cost(config_of(recipe), recipe.masking.ratio)
    tflops = cost.model_flops * median / 1e12
    peak = peak_tflops(bench.device.torch)
    planned = estimate(bench, recipe)
    return {
        "precision": recipe.train.precision_on(bench.device.torch.type),
        "warmup_s": clock.warmup_s,
        "step_s": samples / median,
        "samples_per_s": median,
        "samples_per_s_range": [speeds[0], speeds[-1]],
        "data_wait_s": statistics.median(clock.wait_s),
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "plan_samples_per_s": planned.samples_per_s if planned and bench.device.is_gpu else None,
        "peak_bytes": clock.peak_bytes,
    }
